//! What a file's structure tells before any decoder sees it: does it move, how large is what it
//! holds, where does it end? One walk over its blocks; nothing is decoded, nothing unpacked.

use std::{borrow::Cow, ops::Range};

use image::ImageFormat;

/// A file as a decoder gets it.
pub(super) struct Structure<'a> {
    /// Without what follows its end, and without notes that a decoder would unpack or go through
    /// again and again.
    pub(super) bytes: Cow<'a, [u8]>,
    pub(super) is_animated: bool,
    /// The first size within that is more than is decoded. Each picture of a file has a head of its
    /// own, and the file's first one need not be the largest.
    pub(super) too_large: Option<(u32, u32)>,
}

impl<'a> Structure<'a> {
    /// `None` if it is damaged; not all damage is seen here.
    pub(super) fn read(bytes: &'a [u8], format: ImageFormat) -> Option<Self> {
        match format {
            ImageFormat::Png => Some(png(bytes)),
            ImageFormat::Jpeg => jpeg(bytes),
            ImageFormat::WebP => webp(bytes),
            ImageFormat::Gif => Some(gif(bytes)),
            _ => Some(Self::of(bytes)),
        }
    }

    fn of(bytes: &'a [u8]) -> Self {
        Self {
            bytes: Cow::Borrowed(bytes),
            is_animated: false,
            too_large: None,
        }
    }

    fn saw(&mut self, width: u32, height: u32) {
        if self.too_large.is_none() && super::is_too_large(width, height) {
            self.too_large = Some((width, height));
        }
    }
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..)?.first_chunk().copied()
}

/// What of a file is not for its decoder.
#[derive(Default)]
struct LeftOut(Vec<Range<usize>>);

impl LeftOut {
    fn push(&mut self, range: Range<usize>) {
        match self.0.last_mut() {
            Some(last) if last.end == range.start => last.end = range.end,
            _ => self.0.push(range),
        }
    }

    /// A copy only where something is left out.
    fn of(self, bytes: &[u8]) -> Cow<'_, [u8]> {
        if self.0.is_empty() {
            return Cow::Borrowed(bytes);
        }
        let mut rest = Vec::with_capacity(bytes.len());
        let mut at = 0;
        for range in self.0 {
            rest.extend_from_slice(&bytes[at..range.start]);
            at = range.end;
        }
        rest.extend_from_slice(&bytes[at..]);
        Cow::Owned(rest)
    }
}

/// Chunks of length, kind, data, checksum (PNG 3, section 5).
fn png(bytes: &[u8]) -> Structure<'_> {
    // Notes, which may be packed: 300 MB have room in 300 kB. And what makes an animation of it,
    // which matters no more where its one frame is the picture itself.
    const NOTES: [[u8; 4]; 7] = [
        *b"iCCP", *b"zTXt", *b"iTXt", *b"tEXt", *b"acTL", *b"fcTL", *b"fdAT",
    ];
    let mut structure = Structure::of(bytes);
    let mut left_out = LeftOut::default();
    let mut announced = None;
    // Begun before the picture, and at all.
    let (mut first, mut frames) = (0, 0_usize);
    let mut has_data = false;
    let mut at = 8;
    while let (Some(length), Some(kind)) = (array(bytes, at), array::<4>(bytes, at + 4)) {
        let length = u32::from_be_bytes(length) as usize;
        let data = at + 8;
        let end = data.saturating_add(length).saturating_add(4);
        let end = end.min(bytes.len());
        let number = |at| array(bytes, at).map_or(0, u32::from_be_bytes);
        match &kind {
            b"IHDR" => structure.saw(number(data), number(data + 4)),
            b"IDAT" => has_data = true,
            b"acTL" if !has_data => announced = Some(number(data)),
            b"fcTL" => {
                first += usize::from(!has_data);
                frames += 1;
            }
            b"fdAT" => frames += 1,
            b"IEND" => break,
            _ => {}
        }
        if NOTES.contains(&kind) {
            left_out.push(at..end);
        }
        at = end;
    }
    structure.is_animated =
        announced.is_some_and(|announced| (announced, first, frames) != (1, 1, 1));
    structure.bytes = left_out.of(bytes);
    structure
}

/// Segments from mark to mark, to the end of the first picture (T.81, annex B). Behind it phones
/// put films, maps and second pictures, in which any two bytes may look like a mark. `None` for one
/// that does not end: a decoder takes half a picture for whole, and what lacks would be judged as if
/// it were grey.
fn jpeg(bytes: &[u8]) -> Option<Structure<'_>> {
    /// Which the decoder goes through anew with each of them.
    const MORE_XMP: &[u8] = b"http://ns.adobe.com/xmp/extension/\0";
    let mut structure = Structure::of(bytes);
    let mut left_out = LeftOut::default();
    let mut has_scan = false;
    let mut at = 2;
    loop {
        // Past coded pixels.
        at += bytes.get(at..)?.iter().position(|byte| *byte == 0xff)?;
        let start = at;
        at += bytes[at..].iter().position(|byte| *byte != 0xff)?;
        let mark = bytes[at];
        at += 1;
        match mark {
            // Of the pixels themselves, or marks without a segment.
            0x00 | 0x01 | 0xd0..=0xd8 => continue,
            0xd9 if has_scan => {
                structure.bytes = left_out.of(&bytes[..at]);
                return Some(structure);
            }
            0xd9 => return None,
            _ => {}
        }
        let end = at + usize::from(u16::from_be_bytes(array(bytes, at)?));
        let segment = bytes.get(at + 2..end)?;
        match mark {
            0xda => has_scan = true,
            // Tables have numbers among those of frames.
            0xc4 | 0xc8 | 0xcc => {}
            0xc0..=0xcf => {
                let side = |at| array(segment, at).map_or(0, u16::from_be_bytes);
                structure.saw(side(3).into(), side(1).into());
            }
            0xe1 if segment.starts_with(MORE_XMP) => left_out.push(start..end),
            _ => {}
        }
        at = end;
    }
}

/// Chunks of kind, length, data (RFC 9649).
fn webp(bytes: &[u8]) -> Option<Structure<'_>> {
    let word = |at| array(bytes, at).map(u32::from_le_bytes);
    let is_extended = bytes.get(12..16) == Some(b"VP8X");
    let may_move = is_extended && bytes.get(20).is_some_and(|flags| flags & 2 != 0);
    let canvas = match (word(23), word(26)) {
        (Some(width), Some(height)) if is_extended => ((width >> 8) + 1, (height >> 8) + 1),
        _ => (0, 0),
    };
    let mut structure = Structure::of(bytes);
    structure.saw(canvas.0, canvas.1);
    let mut frames = 0;
    let mut at = 12;
    while let (Some(kind), Some(length)) = (array::<4>(bytes, at), word(at + 4)) {
        let data = at + 8;
        let end = data.saturating_add(length as usize);
        match &kind {
            b"VP8 " | b"VP8L" => saw_coded(&mut structure, data),
            b"ANMF" => {
                frames += 1;
                // After its place, size and time.
                let mut inner = data + 16;
                while let Some(length) = word(inner + 4).filter(|_| inner < end) {
                    // By any name: what follows transparency is decoded whatever it is called.
                    saw_coded(&mut structure, inner + 8);
                    inner = after(inner + 8, length);
                }
            }
            // The decoder makes room for as much as it says.
            b"EXIF" if end > bytes.len() => return None,
            _ => {}
        }
        at = after(data, length);
    }
    // One frame is a picture, if it is the only one there was: of a file that is cut off nobody
    // knows. The decoder holds three copies of it.
    let pixels = u64::from(canvas.0) * u64::from(canvas.1);
    let is_whole = word(4).is_some_and(|length| bytes.len() >= length as usize + 8);
    let is_still = frames < 2 && is_whole && pixels * 12 <= super::MAX_MEMORY;
    structure.is_animated = may_move && frames > 0 && !is_still;
    Some(structure)
}

/// Where the next chunk begins: at an even place.
fn after(data: usize, length: u32) -> usize {
    let length = length as usize;
    data.saturating_add(length).saturating_add(length % 2)
}

/// The size in the head of a coded picture, lossy or lossless, which need not be its canvas's.
fn saw_coded(structure: &mut Structure<'_>, data: usize) {
    let bytes = structure.bytes.get(data..).unwrap_or_default();
    let size = if bytes.get(3..6) == Some(&[0x9d, 0x01, 0x2a]) {
        let side = |at| array(bytes, at).map_or(0, |side| u16::from_le_bytes(side) & 0x3fff);
        (side(6).into(), side(8).into())
    } else if bytes.first() == Some(&0x2f) {
        let sides = array(bytes, 1).map_or(0, u32::from_le_bytes);
        ((sides & 0x3fff) + 1, ((sides >> 14) & 0x3fff) + 1)
    } else {
        return;
    };
    structure.saw(size.0, size.1);
}

/// Blocks (GIF89a, sections 18 to 27). One that is cut off has as many frames as are there.
fn gif(bytes: &[u8]) -> Structure<'_> {
    const EXTENSION: u8 = 0x21;
    const FRAME: u8 = 0x2c;
    let table = |flags: u8| match flags & 0x80 {
        0 => 0,
        _ => 3 << ((flags & 7) + 1),
    };
    let side = |at| -> u32 { array(bytes, at).map_or(0, u16::from_le_bytes).into() };
    let mut structure = Structure::of(bytes);
    structure.saw(side(6), side(8));
    let mut frames = 0;
    // Signature, size, flags, background, aspect; then the table of colours.
    let mut at = 13 + bytes.get(10).map_or(0, |flags| table(*flags));
    while let Some(kind) = bytes.get(at) {
        at += match *kind {
            EXTENSION => 2,
            FRAME => {
                frames += 1;
                // A frame may be larger than the screen.
                structure.saw(side(at + 5), side(at + 7));
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
    structure.is_animated = frames > 1;
    structure
}
