//! Pictures that come from outside: what a file really is, and what of it goes to a model.
//!
//! ```text
//! bytes ─► what format? ─► does it move? ─► how large, by its heads? ─► decode ─► scale ─► upright ─► encode
//! ```
//!
//! Whatever cannot be shown to a model as it is meant is refused here, before anything is paid: no
//! bytes, another format, damage, an animation (of which one frame would be judged for all), more
//! pixels than memory is for. The rest is made small and upright and written anew, so that nothing
//! of the file but its pixels goes out: no place where it was taken, no camera, no second picture.
//!
//! A decoder is never believed to hold its limits by itself: the sizes in all heads are checked before
//! it sees the file, and what it would unpack besides the pixels is taken out. Decoding runs on a few
//! threads of its own; whoever comes then waits.

mod structure;

use std::{
    io::Cursor,
    sync::{Arc, LazyLock},
    time::Duration,
};

use bytes::Bytes;
use image::{
    DynamicImage, ImageDecoder, ImageError, ImageFormat, ImageReader, Limits, Rgb, RgbImage,
    RgbaImage,
    codecs::{
        jpeg::JpegEncoder,
        png::{CompressionType, FilterType as PngFilter, PngEncoder},
    },
    imageops::FilterType,
    metadata::Orientation,
};
use tokio::sync::Semaphore;

use structure::Structure;

use crate::task::{self, BlockingError};

/// Largest file.
pub const MAX_BYTES: usize = 10 << 20;
/// Longest side that goes to a model, in pixels: the model's own limit, beyond which the provider
/// scales down itself and the wire is all that is paid for.
pub const MAX_SIDE: u32 = 1568;
/// Largest file that a site's picture is made of.
const MAX_SITE_BYTES: usize = 32 << 20;
/// Longest side of a site's picture, in pixels: a large screen's width.
const MAX_SITE_SIDE: u32 = 2560;
/// Most pixels that are decoded: what today's phones make, 8160 by 6120.
const MAX_PIXELS: u64 = 50_000_000;
/// Longest side that is decoded.
const MAX_DECODED_SIDE: u32 = 20_000;
/// Most memory for the pixels of one file. 50 million of 4 bytes have room, of 16 bits a channel
/// there may be fewer.
const MAX_MEMORY: u64 = 256 << 20;
/// Most bytes that go to a model. The provider takes 5 MB of base64.
const MAX_SENT: usize = 3_500_000;
/// Files decoded at once.
const AT_ONCE: usize = 2;
/// 50 million pixels take 2 s on a slow core.
const DEADLINE: Duration = Duration::from_secs(60);
/// What is seen through a picture that cannot be sent with its transparency: both black and white
/// drawings stay visible on it.
const BEHIND: u8 = 160;

/// What a picture is developed for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Use {
    Model,
    /// To be shown to people.
    Site,
}

impl Use {
    fn max_bytes(self) -> usize {
        match self {
            Self::Model => MAX_BYTES,
            Self::Site => MAX_SITE_BYTES,
        }
    }

    fn max_side(self) -> u32 {
        match self {
            Self::Model => MAX_SIDE,
            Self::Site => MAX_SITE_SIDE,
        }
    }
}

/// A picture as a model or a site gets it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Picture {
    pub media_type: &'static str,
    pub data: Vec<u8>,
    /// Of the data, upright.
    pub width: u32,
    pub height: u32,
    pub original: Original,
}

/// What the file was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Original {
    /// `PNG`, `JPEG`, …
    pub format: &'static str,
    /// Upright.
    pub width: u32,
    pub height: u32,
}

/// Why a file is not shown to a model. Each sentence says what to do.
#[derive(Debug, thiserror::Error)]
pub enum PictureError {
    #[error("the image is empty: the file has no bytes")]
    Empty,
    #[error(
        "the image has {:.1} MB, more than the {} MB that are taken; scale it down",
        *bytes as f64 / f64::from(1 << 20), most >> 20
    )]
    TooLarge { bytes: usize, most: usize },
    #[error("the file is {what}; send PNG, JPEG, WebP, GIF or BMP")]
    Unknown { what: &'static str },
    #[error("the {format} image cannot be decoded: it is damaged or cut off")]
    Damaged {
        format: &'static str,
        #[source]
        source: Option<ImageError>,
    },
    #[error(
        "the image has {width} by {height} pixels, more than are decoded ({} million, and \
         {MAX_DECODED_SIDE} a side); scale it down",
        MAX_PIXELS / 1_000_000
    )]
    TooManyPixels { width: u32, height: u32 },
    #[error("the {format} image is animated; send the one frame of it that is meant")]
    Animated { format: &'static str },
    #[error(transparent)]
    Blocking(#[from] BlockingError),
}

/// Makes a picture of a file, for a model. Waits while others are decoded.
///
/// # Errors
/// [`PictureError`].
pub async fn develop(bytes: Bytes) -> Result<Picture, PictureError> {
    develop_as(bytes, Use::Model).await
}

/// Makes a picture of a file, to be shown on a site: no larger than a screen, and none of the file but
/// its pixels. Takes 32 MB, since models make PNGs.
///
/// # Errors
/// [`PictureError`].
pub async fn for_site(bytes: Bytes) -> Result<Picture, PictureError> {
    develop_as(bytes, Use::Site).await
}

async fn develop_as(bytes: Bytes, to: Use) -> Result<Picture, PictureError> {
    static DARKROOM: LazyLock<Arc<Semaphore>> = LazyLock::new(|| Arc::new(Semaphore::new(AT_ONCE)));
    // What needs no decoder needs no waiting either.
    check_size(&bytes, to)?;
    let slot = DARKROOM.clone().acquire_owned().await;
    let slot = slot.expect("the semaphore is never closed");
    task::blocking_apart("decoding an image", DEADLINE, move || {
        // Held also by one that nobody waits for any more: it has its memory still.
        let _slot = slot;
        develop_now_as(&bytes, to)
    })
    .await?
}

/// As [`develop`], now and here. Blocking.
///
/// # Errors
/// [`PictureError`].
pub fn develop_now(bytes: &[u8]) -> Result<Picture, PictureError> {
    develop_now_as(bytes, Use::Model)
}

fn develop_now_as(bytes: &[u8], to: Use) -> Result<Picture, PictureError> {
    check_size(bytes, to)?;
    let (format, name) = format_of(bytes)?;
    let damaged = |source: ImageError| match source {
        // Of a head that asks for more than is there to be had.
        ImageError::Limits(_) => PictureError::Damaged {
            format: name,
            source: None,
        },
        source => PictureError::Damaged {
            format: name,
            source: Some(source),
        },
    };
    let structure = Structure::read(bytes, format).ok_or(PictureError::Damaged {
        format: name,
        source: None,
    })?;
    if structure.is_animated {
        return Err(PictureError::Animated { format: name });
    }
    if let Some((width, height)) = structure.too_large {
        return Err(PictureError::TooManyPixels { width, height });
    }
    let mut reader = ImageReader::with_format(Cursor::new(&structure.bytes), format);
    reader.limits(limits());
    let mut decoder = reader.into_decoder().map_err(damaged)?;
    let (width, height) = decoder.dimensions();
    if is_too_large(width, height) || decoder.total_bytes() > MAX_MEMORY {
        return Err(PictureError::TooManyPixels { width, height });
    }
    // A picture whose note on it cannot be read is as upright as it lies.
    let orientation = decoder.orientation().unwrap_or(Orientation::NoTransforms);
    let image = DynamicImage::from_decoder(decoder).map_err(damaged)?;
    // First small, then the rest, which takes memory again.
    let side = to.max_side();
    let mut image = match (width.max(height) > side, to) {
        (true, Use::Model) => image.thumbnail(side, side),
        (true, Use::Site) => image.resize(side, side, FilterType::CatmullRom),
        (false, _) => image,
    };
    image.apply_orientation(orientation);
    let turned = |(width, height): (u32, u32)| match orientation {
        Orientation::Rotate90
        | Orientation::Rotate270
        | Orientation::Rotate90FlipH
        | Orientation::Rotate270FlipH => (height, width),
        _ => (width, height),
    };
    let original = turned((width, height));
    let (width, height) = (image.width(), image.height());
    let (data, media_type) = match to {
        Use::Model => encode(image).map_err(damaged)?,
        // Made small already, by an encoder that is better than ours.
        Use::Site
            if format == ImageFormat::WebP && is_bare_webp(bytes) && side_fits(original, side) =>
        {
            (bytes.to_vec(), "image/webp")
        }
        Use::Site => encode_for_site(image).map_err(damaged)?,
    };
    Ok(Picture {
        media_type,
        data,
        width,
        height,
        original: Original {
            format: name,
            width: original.0,
            height: original.1,
        },
    })
}

fn check_size(bytes: &[u8], to: Use) -> Result<(), PictureError> {
    let most = to.max_bytes();
    match bytes.len() {
        0 => Err(PictureError::Empty),
        bytes if bytes > most => Err(PictureError::TooLarge { bytes, most }),
        _ => Ok(()),
    }
}

fn is_too_large(width: u32, height: u32) -> bool {
    u64::from(width) * u64::from(height) > MAX_PIXELS || width.max(height) > MAX_DECODED_SIDE
}

fn side_fits((width, height): (u32, u32), side: u32) -> bool {
    width.max(height) <= side
}

/// A WebP file of nothing but one coded picture: no notes, no profile, nothing behind it.
fn is_bare_webp(bytes: &[u8]) -> bool {
    let word = |at: usize| {
        let word = bytes.get(at..at + 4)?;
        Some(u32::from_le_bytes(word.try_into().ok()?) as usize)
    };
    let is_picture = matches!(bytes.get(12..16), Some(b"VP8 " | b"VP8L"));
    let size = word(16).map(|size| size + size % 2 + 20);
    is_picture && size == Some(bytes.len()) && word(4) == Some(bytes.len() - 8)
}

fn limits() -> Limits {
    let mut limits = Limits::default();
    limits.max_alloc = Some(MAX_MEMORY * 2);
    limits
}

/// By its first bytes: names and declared types of files are whatever somebody wrote.
fn format_of(bytes: &[u8]) -> Result<(ImageFormat, &'static str), PictureError> {
    let named = match image::guess_format(bytes) {
        Ok(format @ ImageFormat::Png) => (format, "PNG"),
        Ok(format @ ImageFormat::Jpeg) => (format, "JPEG"),
        Ok(format @ ImageFormat::WebP) => (format, "WebP"),
        Ok(format @ ImageFormat::Gif) => (format, "GIF"),
        Ok(format @ ImageFormat::Bmp) => (format, "BMP"),
        _ => {
            return Err(PictureError::Unknown {
                what: what_else(bytes),
            });
        }
    };
    Ok(named)
}

/// What people send instead, so that they hear its name.
fn what_else(bytes: &[u8]) -> &'static str {
    let start = &bytes[..bytes.len().min(1024)];
    let brand = bytes.get(4..12).unwrap_or_default();
    let text = start.trim_ascii_start();
    if let Some(brand) = brand.strip_prefix(b"ftyp") {
        return match brand {
            b"avif" | b"avis" => "an AVIF image",
            b"heic" | b"heix" | b"hevc" | b"mif1" | b"msf1" => "a HEIC image",
            _ => "a video",
        };
    }
    if start.starts_with(b"II*\0") || start.starts_with(b"MM\0*") {
        "a TIFF image"
    } else if start.starts_with(b"%PDF-") {
        "a PDF document"
    } else if text.starts_with(b"<svg") || text.starts_with(b"<?xml") {
        "an SVG drawing"
    } else if text.starts_with(b"<") {
        "a web page"
    } else {
        "no image that is known here"
    }
}

/// JPEG; PNG for what can be seen through.
fn encode(image: DynamicImage) -> Result<(Vec<u8>, &'static str), ImageError> {
    let mut opaque = None;
    if image.color().has_alpha() {
        let image = image.to_rgba8();
        if image.pixels().any(|pixel| pixel.0[3] < u8::MAX) {
            let mut png = Vec::new();
            image.write_with_encoder(PngEncoder::new(&mut png))?;
            if png.len() <= MAX_SENT {
                return Ok((png, "image/png"));
            }
            opaque = Some(flattened(&image));
        }
    }
    let image = opaque.unwrap_or_else(|| image.into_rgb8());
    let mut jpeg = Vec::new();
    for quality in [88, 70, 40] {
        jpeg.clear();
        image.write_with_encoder(JpegEncoder::new_with_quality(&mut jpeg, quality))?;
        if jpeg.len() <= MAX_SENT {
            break;
        }
    }
    Ok((jpeg, "image/jpeg"))
}

/// JPEG as people see no difference in; PNG for what can be seen through.
fn encode_for_site(image: DynamicImage) -> Result<(Vec<u8>, &'static str), ImageError> {
    const QUALITY: u8 = 82;
    let mut data = Vec::new();
    if image.color().has_alpha() {
        let image = image.to_rgba8();
        if image.pixels().any(|pixel| pixel.0[3] < u8::MAX) {
            let best =
                PngEncoder::new_with_quality(&mut data, CompressionType::Best, PngFilter::Adaptive);
            image.write_with_encoder(best)?;
            return Ok((data, "image/png"));
        }
    }
    let encoder = JpegEncoder::new_with_quality(&mut data, QUALITY);
    image.into_rgb8().write_with_encoder(encoder)?;
    Ok((data, "image/jpeg"))
}

fn flattened(image: &RgbaImage) -> RgbImage {
    RgbImage::from_fn(image.width(), image.height(), |x, y| {
        let [r, g, b, a] = image.get_pixel(x, y).0;
        let over = |channel: u8| {
            let (front, back) = (u16::from(a), u16::from(u8::MAX - a));
            let mixed = (u16::from(channel) * front + u16::from(BEHIND) * back) / 255;
            u8::try_from(mixed).unwrap_or(u8::MAX)
        };
        Rgb([over(r), over(g), over(b)])
    })
}

#[cfg(test)]
mod tests;
