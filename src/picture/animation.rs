//! Does a picture move? Read from the file's structure: nothing is decoded.

use std::io::Cursor;

use image::{
    ImageFormat, ImageResult,
    codecs::{png::PngDecoder, webp::WebPDecoder},
};

pub(super) fn is_animated(bytes: &[u8], format: ImageFormat) -> ImageResult<bool> {
    match format {
        ImageFormat::Png => PngDecoder::with_limits(Cursor::new(bytes), super::limits())?.is_apng(),
        ImageFormat::WebP => Ok(WebPDecoder::new(Cursor::new(bytes))?.has_animation()),
        ImageFormat::Gif => Ok(gif_frames(bytes) > 1),
        _ => Ok(false),
    }
}

/// How many frames the blocks of a GIF begin (GIF89a, sections 18 to 27). One that is cut off has
/// as many as are there.
fn gif_frames(bytes: &[u8]) -> usize {
    const EXTENSION: u8 = 0x21;
    const FRAME: u8 = 0x2c;
    let table = |flags: u8| match flags & 0x80 {
        0 => 0,
        _ => 3 << ((flags & 7) + 1),
    };
    let mut frames = 0;
    // Signature, size, flags, background, aspect; then the table of colours.
    let mut at = 13 + bytes.get(10).map_or(0, |flags| table(*flags));
    while let Some(kind) = bytes.get(at) {
        at += match *kind {
            EXTENSION => 2,
            FRAME => {
                frames += 1;
                let Some(flags) = bytes.get(at + 9) else {
                    break;
                };
                // Place, size, flags; its table; the size of codes.
                11 + table(*flags)
            }
            _ => break,
        };
        // Blocks of up to 255 bytes, to an empty one.
        while let Some(length @ 1..) = bytes.get(at).copied() {
            at += 1 + usize::from(length);
        }
        at += 1;
    }
    frames
}
