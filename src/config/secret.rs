//! A value that must never be shown.

use std::fmt;

/// A credential or key. `Debug` and `Display` print `***`, whatever its length; only
/// [`Secret::expose`] gives the value, so every use of it is easy to find.
///
/// It does not serialize: a struct that holds one cannot leave the program by accident.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// What stands in the place of a secret wherever it would be shown.
    pub const MASK: &str = "***";

    /// Wraps a value.
    pub fn new(value: impl Into<String>) -> Self {
        Self(value.into())
    }

    /// The value itself: for a header, an HMAC or a child's stdin, never for a log, an error, an
    /// argument or an environment. Compare with `subtle`, not with `==`, where a stranger
    /// supplies the other side.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(Self::MASK)
    }
}

impl fmt::Display for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(Self::MASK)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_shows_nothing_of_itself() {
        let secret = Secret::new("canary-0b7e");
        assert_eq!(
            format!("{secret} {secret:?} {:#?}", Some(&secret)),
            "*** *** Some(\n    ***,\n)"
        );
        assert_eq!(secret.expose(), "canary-0b7e");
    }
}
