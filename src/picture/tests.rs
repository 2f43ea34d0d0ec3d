//! Files as people have them, made here.

use image::{Frame, GrayImage, ImageEncoder, Luma, Rgba, codecs::gif::GifEncoder};

use super::*;

/// The left half red, the right half blue.
fn halves(width: u32, height: u32) -> RgbImage {
    RgbImage::from_fn(width, height, |x, _| match x < width / 2 {
        true => Rgb([250, 0, 0]),
        false => Rgb([0, 0, 250]),
    })
}

fn written(image: impl Into<DynamicImage>, format: ImageFormat) -> Vec<u8> {
    let mut bytes = Cursor::new(Vec::new());
    image.into().write_to(&mut bytes, format).unwrap();
    bytes.into_inner()
}

fn read(picture: &Picture) -> RgbImage {
    image::load_from_memory(&picture.data).unwrap().into_rgb8()
}

/// Why it is refused.
fn refused(bytes: &[u8]) -> String {
    develop_now(bytes).unwrap_err().to_string()
}

/// One chunk of a PNG.
fn chunk(kind: &[u8; 4], data: &[u8]) -> Vec<u8> {
    let body = [kind.as_slice(), data].concat();
    let mut crc = u32::MAX;
    for byte in &body {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = (crc >> 1) ^ (0xedb8_8320 & (crc & 1).wrapping_neg());
        }
    }
    let length = u32::try_from(data.len()).unwrap().to_be_bytes();
    [&length[..], &body, &(!crc).to_be_bytes()].concat()
}

/// A chunk of a RIFF file.
fn riff(kind: &[u8; 4], data: &[u8]) -> Vec<u8> {
    let length = u32::try_from(data.len()).unwrap().to_le_bytes();
    let pad = vec![0; data.len() % 2];
    [kind.as_slice(), &length, data, &pad].concat()
}

/// A JPEG with a note of how it lies.
fn lying(orientation: u8) -> Vec<u8> {
    let plain = written(halves(80, 40), ImageFormat::Jpeg);
    let mut exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0".to_vec();
    exif.extend([orientation, 0, 0, 0, 0, 0, 0]);
    let length = u16::try_from(exif.len() + 2).unwrap().to_be_bytes();
    [&plain[..2], &[0xff, 0xe1], &length, &exif, &plain[2..]].concat()
}

#[test]
fn every_format_that_is_taken_becomes_one_that_a_model_reads() {
    for (format, name) in [
        (ImageFormat::Png, "PNG"),
        (ImageFormat::Jpeg, "JPEG"),
        (ImageFormat::WebP, "WebP"),
        (ImageFormat::Gif, "GIF"),
        (ImageFormat::Bmp, "BMP"),
    ] {
        let picture = develop_now(&written(halves(64, 48), format)).unwrap();
        assert_eq!(picture.original.format, name);
        assert_eq!((picture.width, picture.height), (64, 48), "{name}");
        assert_eq!(picture.media_type, "image/jpeg", "{name}");
        let seen = read(&picture);
        assert!(seen.get_pixel(5, 20).0[0] > 200, "{name}");
        assert!(seen.get_pixel(60, 20).0[2] > 200, "{name}");
    }
    // 16 bits, grey, and with holes.
    let deep = DynamicImage::ImageRgb8(halves(30, 30)).into_rgb16();
    develop_now(&written(deep, ImageFormat::Png)).unwrap();
    let grey = GrayImage::from_pixel(30, 30, Luma([9]));
    develop_now(&written(grey, ImageFormat::Jpeg)).unwrap();
    let hole = RgbaImage::from_fn(30, 30, |x, _| Rgba([255, 255, 255, (x * 8) as u8]));
    let picture = develop_now(&written(hole, ImageFormat::Png)).unwrap();
    assert_eq!(picture.media_type, "image/png");
}

#[test]
fn what_cannot_be_shown_is_refused_with_its_reason() {
    assert_eq!(refused(b""), "the image is empty: the file has no bytes");
    let large = vec![0; MAX_BYTES + 1];
    assert!(refused(&large).contains("10.0 MB"), "{}", refused(&large));
    for (bytes, said) in [
        (&b"hello"[..], "no image that is known here"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "an SVG"),
        (b"\n<html></html>", "a web page"),
        (b"%PDF-1.7", "a PDF"),
        (b"\0\0\0\x20ftypheic\0\0\0\0", "a HEIC"),
        (b"\0\0\0\x20ftypavif\0\0\0\0", "an AVIF"),
        (b"\0\0\0\x20ftypisom\0\0\0\0", "a video"),
        (b"II*\0\x08\0\0\0", "a TIFF"),
    ] {
        let why = refused(bytes);
        assert!(why.contains(said) && why.contains("send PNG"), "{why}");
    }
    for format in [
        ImageFormat::Png,
        ImageFormat::Jpeg,
        ImageFormat::WebP,
        ImageFormat::Bmp,
        ImageFormat::Gif,
    ] {
        let whole = written(halves(200, 100), format);
        for cut in [20, whole.len() / 2] {
            let why = refused(&whole[..cut]);
            assert!(why.contains("cut off"), "{format:?} at {cut}: {why}");
        }
    }
    // A thumbnail's end is not the picture's.
    let thumbnail = written(halves(8, 8), ImageFormat::Jpeg);
    let whole = written(halves(200, 100), ImageFormat::Jpeg);
    let length = u16::try_from(thumbnail.len() + 2).unwrap().to_be_bytes();
    let cut = &whole[2..whole.len() / 2];
    let half = [&whole[..2], &[0xff, 0xe2], &length, &thumbnail, cut].concat();
    assert!(refused(&half).contains("cut off"));
    // What stands behind the end harms nobody.
    let more = [&whole[..], b"trailer"].concat();
    assert!(develop_now(&more).is_ok());
}

#[test]
fn a_bomb_is_refused_by_its_head() {
    // 1.2 GB of pixels in a kilobyte.
    let mut jpeg = written(halves(64, 64), ImageFormat::Jpeg);
    let head = jpeg.windows(2).position(|pair| pair == [0xff, 0xc0]);
    let size = head.unwrap() + 5;
    jpeg[size..size + 4].copy_from_slice(&[0x4e, 0x20, 0x4e, 0x20]);
    assert!(
        refused(&jpeg).contains("20000 by 20000 pixels"),
        "{}",
        refused(&jpeg)
    );
    let png = |width: u32, height: u32| {
        let size = [width.to_be_bytes(), height.to_be_bytes()].concat();
        let head = chunk(b"IHDR", &[&size[..], &[8, 2, 0, 0, 0]].concat());
        let data = chunk(b"IDAT", &[0x78, 0x9c, 0x03, 0, 0, 0, 0, 0x01]);
        [b"\x89PNG\r\n\x1a\n", &head[..], &data, &chunk(b"IEND", b"")].concat()
    };
    assert!(refused(&png(50_000, 50_000)).contains("scale it down"));
    assert!(refused(&png(1, 60_000)).contains("scale it down"));
    // One that is as large as its head says, and small when packed, is no bomb.
    let flat = GrayImage::from_pixel(5000, 4000, Luma([200]));
    let flat = written(flat, ImageFormat::Png);
    assert!(flat.len() < 200_000);
    let picture = develop_now(&flat).unwrap();
    assert_eq!((picture.width, picture.height), (MAX_SIDE, 1254));
    assert_eq!(
        (picture.original.width, picture.original.height),
        (5000, 4000)
    );
    // And the thinnest of pictures stays one.
    let line = written(GrayImage::new(1, 15_000), ImageFormat::Png);
    let picture = develop_now(&line).unwrap();
    assert_eq!((picture.width, picture.height), (1, MAX_SIDE));
}

#[test]
fn one_that_moves_is_refused_and_a_still_one_of_its_kind_is_not() {
    let gif = |frames: u8| {
        let mut bytes = Vec::new();
        let mut encoder = GifEncoder::new(&mut bytes);
        for frame in 0..frames {
            let image = RgbaImage::from_pixel(20, 20, Rgba([frame * 100, 9, 9, 255]));
            encoder.encode_frame(Frame::new(image)).unwrap();
        }
        drop(encoder);
        bytes
    };
    assert!(develop_now(&gif(1)).is_ok());
    assert!(refused(&gif(2)).contains("GIF image is animated"));

    let still = written(halves(20, 20), ImageFormat::Png);
    // Right after the head, which has 25 bytes after the signature's 8.
    let png = |parts: &[Vec<u8>]| [&still[..33], &parts.concat(), &still[33..]].concat();
    let control = |frames| chunk(b"acTL", &[0, 0, 0, frames, 0, 0, 0, 0]);
    let frame = [0, 0, 0, 0, 0, 0, 0, 20, 0, 0, 0, 20, 0, 0, 0, 0, 0, 0, 0, 0];
    let frame = chunk(b"fcTL", &[&frame[..], &[0, 1, 0, 1, 0, 0]].concat());
    assert!(refused(&png(&[control(2)])).contains("PNG image is animated"));
    // One that shows another picture than the one that is decoded here.
    let other = png(&[control(1), chunk(b"fdAT", &[0; 9])]);
    assert!(refused(&other).contains("PNG image is animated"));
    assert!(develop_now(&png(&[control(1), frame])).is_ok());

    let still = written(halves(20, 20), ImageFormat::WebP);
    let flags = [2, 0, 0, 0, 19, 0, 0, 19, 0, 0];
    let place = [0, 0, 0, 0, 0, 0, 19, 0, 0, 19, 0, 0, 50, 0, 0, 0];
    let frame = riff(b"ANMF", &[&place[..], &still[12..]].concat());
    let webp = |frames| {
        let head = [riff(b"VP8X", &flags), riff(b"ANIM", &[0; 6])].concat();
        riff(
            b"RIFF",
            &[b"WEBP", &head[..], &frame.repeat(frames)].concat(),
        )
    };
    let two = webp(2);
    assert!(refused(&two).contains("WebP image is animated"));
    let picture = develop_now(&webp(1)).unwrap();
    let seen = read(&picture);
    assert!(seen.get_pixel(2, 9).0[0] > 200 && seen.get_pixel(17, 9).0[2] > 200);
    // Of two the second one may be cut off without a trace.
    assert!(develop_now(&two[..two.len() - frame.len()]).is_err());
}

#[test]
fn what_is_larger_than_its_file_says_is_refused_by_its_own_head() {
    let mut gif = written(halves(20, 20), ImageFormat::Gif);
    let table = 3 << ((gif[10] & 7) + 1);
    let frame = 13 + if gif[10] & 0x80 == 0 { 0 } else { table };
    let frame = frame + gif[frame..].iter().position(|byte| *byte == 0x2c).unwrap();
    gif[frame + 5..frame + 9].copy_from_slice(&[0x30, 0x75, 0xd0, 0x07]);
    assert!(
        refused(&gif).contains("30000 by 2000 pixels"),
        "{}",
        refused(&gif)
    );

    // 16,000 pixels a side on a canvas of 20.
    let coded = [0x10, 0, 0, 0x9d, 1, 0x2a, 0x80, 0x3e, 0x80, 0x3e, 0, 0];
    let webp = |flags: u8, parts: &[Vec<u8>]| {
        let head = riff(b"VP8X", &[flags, 0, 0, 0, 19, 0, 0, 19, 0, 0]);
        riff(b"RIFF", &[b"WEBP", &head[..], &parts.concat()].concat())
    };
    let place = [0, 0, 0, 0, 0, 0, 19, 0, 0, 19, 0, 0, 50, 0, 0, 0];
    let hidden = [riff(b"ALPH", &[0; 9]), riff(b"none", &coded)].concat();
    let hidden = riff(b"ANMF", &[&place[..], &hidden].concat());
    for bytes in [
        webp(0, &[riff(b"VP8 ", &coded)]),
        webp(2, &[riff(b"ANIM", &[0; 6]), hidden]),
    ] {
        assert!(
            refused(&bytes).contains("16000 by 16000"),
            "{}",
            refused(&bytes)
        );
    }
    let canvas = riff(b"VP8X", &[0, 0, 0, 0, 0xff, 0xff, 0, 0xff, 0xff, 0]);
    let canvas = riff(b"RIFF", &[b"WEBP", &canvas[..]].concat());
    assert!(refused(&canvas).contains("65536 by 65536"));

    // A note of 4 GB in a few bytes: room would be made for it.
    let still = written(halves(20, 20), ImageFormat::WebP);
    let note = [b"EXIF", &u32::MAX.to_le_bytes()[..], b"MM\0*"].concat();
    let noted = webp(8, &[still[12..].to_vec(), note]);
    assert!(refused(&noted).contains("cut off"));

    // A second head of a JPEG, for the decoder to find when it has made room for the first.
    let jpeg = written(halves(64, 64), ImageFormat::Jpeg);
    let end = jpeg.len() - 2;
    let head = [0xff, 0xc0, 0, 11, 8, 0xff, 0xff, 0xff, 0xff, 1, 1, 0x11, 0];
    let jpeg = [&jpeg[..end], &head, &jpeg[end..]].concat();
    assert!(refused(&jpeg).contains("65535 by 65535"));
}

#[test]
fn notes_are_not_unpacked() {
    let still = written(halves(80, 40), ImageFormat::Png);
    let bare = |bytes: &[u8], format| Structure::read(bytes, format).unwrap().bytes.into_owned();
    let packed = |kind| chunk(kind, b"x\0\0 300 MB of zeros");
    let notes = [b"iCCP", b"zTXt", b"iTXt", b"tEXt"].map(packed).concat();
    let end = still.len() - 12;
    let noted = [&still[..33], &notes, &still[33..end], &notes, &still[end..]].concat();
    assert_eq!(bare(&noted, ImageFormat::Png), still);
    assert_eq!(develop_now(&noted).unwrap(), develop_now(&still).unwrap());
    // How it lies is no packed note, and one without such notes is not copied.
    let mut lies = b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0".to_vec();
    lies.extend([6, 0, 0, 0, 0, 0, 0]);
    let lying_png = [&still[..33], &chunk(b"eXIf", &lies), &notes, &still[33..]].concat();
    let picture = develop_now(&lying_png).unwrap();
    assert_eq!((picture.width, picture.height), (40, 80));
    let structure = Structure::read(&still, ImageFormat::Png).unwrap();
    assert!(matches!(structure.bytes, std::borrow::Cow::Borrowed(_)));
    // A chunk of more than there is.
    for kind in [b"iCCP", b"IDAT", b"eXIf"] {
        let long = [&still[..33], &u32::MAX.to_be_bytes(), kind, b"abc"].concat();
        assert!(refused(&long).contains("cut off"));
    }

    // A JPEG's notes in parts, which the decoder would go through anew with each of them.
    let plain = lying(6);
    let part = [&b"http://ns.adobe.com/xmp/extension/\0"[..], &[b'0'; 41]].concat();
    let length = u16::try_from(part.len() + 2).unwrap().to_be_bytes();
    let part = [&[0xff, 0xe1], &length[..], &part].concat();
    let noted = [&plain[..2], &part.repeat(20_000), &plain[2..]].concat();
    assert_eq!(bare(&noted, ImageFormat::Jpeg), plain);
    assert_eq!(develop_now(&noted).unwrap(), develop_now(&plain).unwrap());
}

#[test]
fn a_jpeg_is_as_whole_as_its_first_picture() {
    let whole = written(halves(200, 100), ImageFormat::Jpeg);
    let expected = develop_now(&whole).unwrap();
    let film = b"\0\0\0\x18ftypmp42 \xff\xda\0\x02\xff\xc0\xff";
    for trailer in [
        &[0xff, 0xda][..],
        &[0xff],
        &[0xff, 0xd9, 0xff, 0xda],
        &[0xff, 0xc0, 0, 11, 8, 0xff, 0xff, 0xff, 0xff, 1, 1, 0x11, 0],
        film,
        // A second picture, whole and cut off.
        &whole,
        &whole[..whole.len() / 2],
    ] {
        let more = [&whole[..], trailer].concat();
        assert_eq!(develop_now(&more).unwrap(), expected, "{trailer:?}");
    }
    // From where it is known for one.
    for cut in 3..whole.len() {
        assert!(refused(&whole[..cut]).contains("cut off"), "{cut}");
    }
    // Fill bytes, a restart and an empty segment are no end.
    let end = whole.len() - 2;
    let odd = [&whole[..end], &[0xff, 0xff, 0xfe, 0, 2, 0xff, 0xff, 0xd9]].concat();
    assert!(develop_now(&odd).is_ok());
    assert!(refused(&[&whole[..end], &[0xff, 0, 0xd9, 0xff, 0xd0]].concat()).contains("cut off"));
}

#[test]
fn it_stands_upright_and_says_nothing_of_the_camera() {
    for (orientation, size, first) in [
        (1, (80, 40), [250, 0, 0]),
        (2, (80, 40), [0, 0, 250]),
        (3, (80, 40), [0, 0, 250]),
        (6, (40, 80), [250, 0, 0]),
        (8, (40, 80), [0, 0, 250]),
        // No such thing.
        (77, (80, 40), [250, 0, 0]),
    ] {
        let bytes = lying(orientation);
        let picture = develop_now(&bytes).unwrap();
        assert_eq!((picture.width, picture.height), size, "{orientation}");
        assert_eq!((picture.original.width, picture.original.height), size);
        let seen = read(&picture).get_pixel(4, 4).0;
        let is_near = seen.iter().zip(first).all(|(a, b)| a.abs_diff(b) < 60);
        assert!(is_near, "{orientation}: {seen:?}");
        assert!(!picture.data.windows(4).any(|word| word == b"Exif"));
    }
}

#[test]
fn ink_is_turned_into_light() {
    // As printers write it: much cyan, no other ink.
    let mut bytes = Vec::new();
    let ink: Vec<u8> = [255, 0, 0, 0].repeat(32 * 32);
    jpeg_encoder::Encoder::new(&mut bytes, 90)
        .encode(&ink, 32, 32, jpeg_encoder::ColorType::Cmyk)
        .unwrap();
    let [red, green, blue] = read(&develop_now(&bytes).unwrap()).get_pixel(9, 9).0;
    assert!(
        red < 60 && green > 120 && blue > 120,
        "{red} {green} {blue}"
    );
}

#[test]
fn nothing_is_sent_that_the_provider_does_not_take() {
    // Noise packs worst.
    let mut seed = 1_u32;
    let mut noise = || {
        seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        seed.to_be_bytes()
    };
    let image = RgbaImage::from_fn(1400, 1400, |_, _| Rgba(noise()));
    let mut bytes = Vec::new();
    // As WebP it is under 10 MB.
    image::codecs::webp::WebPEncoder::new_lossless(&mut bytes)
        .write_image(&image, 1400, 1400, image::ExtendedColorType::Rgba8)
        .unwrap();
    let picture = develop_now(&bytes).unwrap();
    assert!(picture.data.len() <= MAX_SENT, "{}", picture.data.len());
    assert_eq!(picture.media_type, "image/jpeg");
}

#[tokio::test]
async fn many_at_once_wait_for_each_other() {
    let bytes = Bytes::from(written(halves(300, 300), ImageFormat::Png));
    let all = (0..12).map(|_| develop(bytes.clone()));
    let all = futures_util::future::join_all(all);
    let all = tokio::time::timeout(Duration::from_secs(60), all)
        .await
        .unwrap();
    assert!(all.into_iter().all(|picture| picture.unwrap().width == 300));
}

#[tokio::test]
async fn for_a_site_it_is_large_and_bare() {
    let site = |bytes: Vec<u8>| async { for_site(bytes.into()).await.unwrap() };
    let picture = site(written(halves(3000, 1500), ImageFormat::Png)).await;
    assert_eq!((picture.width, picture.height), (MAX_SITE_SIDE, 1280));
    assert_eq!(picture.media_type, "image/jpeg");
    assert_eq!(read(&picture).dimensions(), (MAX_SITE_SIDE, 1280));
    let picture = site(lying(6)).await;
    assert_eq!((picture.width, picture.height), (40, 80));
    assert!(!picture.data.windows(4).any(|word| word == b"Exif"));
    let hole = RgbaImage::from_pixel(30, 30, Rgba([9, 9, 9, 100]));
    let picture = site(written(hole, ImageFormat::Png)).await;
    assert_eq!(picture.media_type, "image/png");
    // A bare WebP stays as it is; one that says more does not.
    let bare = written(halves(64, 64), ImageFormat::WebP);
    let picture = site(bare.clone()).await;
    assert_eq!((picture.media_type, &picture.data), ("image/webp", &bare));
    let more = [&bare[12..], &riff(b"XMP ", b"who made it")].concat();
    let more = riff(b"RIFF", &[b"WEBP", &more[..]].concat());
    let picture = site(more).await;
    assert_eq!(picture.media_type, "image/jpeg");
    assert!(for_site(b"no image".to_vec().into()).await.is_err());
}
