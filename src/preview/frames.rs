//! Where one WebSocket frame ends and the next begins (RFC 6455 5.2), so that greenroom can say a
//! word of its own between two of a dev server's. Nothing of a frame is kept.

/// A text message of ours, as a server sends it.
pub(crate) fn text_frame(message: &str) -> Vec<u8> {
    /// A whole text message, unmasked.
    const TEXT: u8 = 0x81;
    let mut frame = vec![TEXT];
    match u16::try_from(message.len()) {
        Ok(length) if length <= 125 => frame.push(length.to_be_bytes()[1]),
        Ok(length) => {
            frame.push(126);
            frame.extend(length.to_be_bytes());
        }
        Err(_) => {
            frame.push(127);
            frame.extend((message.len() as u64).to_be_bytes());
        }
    }
    frame.extend(message.as_bytes());
    frame
}

/// Follows a stream of frames.
#[derive(Debug, Default)]
pub(crate) struct Frames {
    /// The head of a frame as far as it came: two bytes, the length, the mask.
    head: Vec<u8>,
    /// Of the frame's payload, still to come.
    left: u64,
    /// A message in several frames has begun.
    is_in_message: bool,
    messages: u64,
}

impl Frames {
    /// These bytes went by.
    pub(crate) fn pass(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            if self.left > 0 {
                let skipped =
                    usize::try_from(self.left).map_or(bytes.len(), |n| n.min(bytes.len()));
                self.left -= skipped as u64;
                bytes = &bytes[skipped..];
                continue;
            }
            self.head.push(bytes[0]);
            bytes = &bytes[1..];
            if let Some(length) = self.length() {
                self.left = length;
                // Control frames may stand within a message.
                if self.head[0] & 0x08 == 0 {
                    self.messages += u64::from(!self.is_in_message);
                    self.is_in_message = self.head[0] & 0x80 == 0;
                }
                self.head.clear();
            }
        }
    }

    /// The payload's length, once the head is whole.
    fn length(&self) -> Option<u64> {
        let short = *self.head.get(1)?;
        let (bytes, mask) = (short & 0x7f, usize::from(short & 0x80 != 0) * 4);
        let extended = match bytes {
            126 => 2,
            127 => 8,
            _ => 0,
        };
        if self.head.len() < 2 + extended + mask {
            return None;
        }
        let length = self.head[2..2 + extended]
            .iter()
            .fold(0, |length, byte| length << 8 | u64::from(*byte));
        Some(if extended == 0 {
            u64::from(bytes)
        } else {
            length
        })
    }

    /// How many messages have begun, those of the protocol's own left out.
    pub(crate) fn messages(&self) -> u64 {
        self.messages
    }

    /// May a message of ours be said here?
    pub(crate) fn is_between(&self) -> bool {
        self.left == 0 && self.head.is_empty() && !self.is_in_message
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_of_ours_come_between_those_of_others() {
        let mut stream = Vec::new();
        let mut ends = Vec::new();
        for length in [0, 5, 125, 126, 70_000] {
            stream.extend(text_frame(&"x".repeat(length)));
            ends.push(stream.len());
        }
        // A message in three frames with a ping within, then one that is masked.
        stream.extend([0x01, 1, b'a', 0x89, 0, 0x00, 1, b'b', 0x80, 1, b'c']);
        ends.push(stream.len());
        stream.extend([0x81, 0x81, 1, 2, 3, 4, b'x']);
        ends.push(stream.len());
        for step in [1, 2, 3, 7, 4096, stream.len()] {
            let mut frames = Frames::default();
            assert!(frames.is_between());
            let mut passed = 0;
            for chunk in stream.chunks(step) {
                frames.pass(chunk);
                passed += chunk.len();
                assert_eq!(
                    frames.is_between(),
                    ends.contains(&passed),
                    "{step} {passed}"
                );
            }
        }
    }
}
