//! Who a call is about: validated ids, the keys made of them, and the names
//! derived from a key (branches, host label, turn ids).
//!
//! Nothing here touches the disk; whatever passes these types is safe to use as
//! one path component and as one component of a git ref.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// Why an id was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{field} must be 1 to 64 characters of A-Z a-z 0-9 . _ -, begin with a letter or digit, \
     hold no \"..\" and not end in \".\" or \".lock\""
)]
pub struct InvalidId {
    /// The field as the caller wrote it (`clientId`, `userId`, `threadId`).
    pub field: &'static str,
}

/// Longest id, in bytes (all allowed characters are ASCII).
pub const MAX_ID_LEN: usize = 64;

fn is_valid_id(id: &str) -> bool {
    (1..=MAX_ID_LEN).contains(&id.len())
        && id.as_bytes()[0].is_ascii_alphanumeric()
        && id
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
        && !id.contains("..")
        && !id.ends_with('.')
        && !id.ends_with(".lock")
}

macro_rules! id_type {
    ($(#[$doc:meta])* $name:ident, $field:literal) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// The id as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = InvalidId;
            fn from_str(id: &str) -> Result<Self, InvalidId> {
                if is_valid_id(id) { Ok(Self(id.to_owned())) } else { Err(InvalidId { field: $field }) }
            }
        }

        impl TryFrom<String> for $name {
            type Error = InvalidId;
            fn try_from(id: String) -> Result<Self, InvalidId> {
                id.parse()
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> String {
                id.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

id_type!(
    /// A customer of the agency.
    ClientId, "clientId"
);
id_type!(
    /// One person of a client.
    UserId, "userId"
);
id_type!(
    /// One conversation of a user.
    ThreadId, "threadId"
);

/// A user of a client: the owner of one repository.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct UserKey {
    pub client: ClientId,
    pub user: UserId,
}

impl UserKey {
    /// `client/{client}`: what the client's published site is made of.
    pub fn client_branch(&self) -> String {
        format!("client/{}", self.client)
    }

    /// `user/{client}/{user}`: branched off the client's.
    pub fn user_branch(&self) -> String {
        format!("user/{}/{}", self.client, self.user)
    }
}

impl fmt::Display for UserKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.client, self.user)
    }
}

/// A thread of a user of a client: what a worktree, an agent session and a preview belong to.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ThreadKey {
    pub client: ClientId,
    pub user: UserId,
    pub thread: ThreadId,
}

impl ThreadKey {
    /// Validates three raw ids.
    ///
    /// # Errors
    /// [`InvalidId`] names the first field that breaks the rules.
    pub fn parse(client: &str, user: &str, thread: &str) -> Result<Self, InvalidId> {
        Ok(Self {
            client: client.parse()?,
            user: user.parse()?,
            thread: thread.parse()?,
        })
    }

    /// The owner of the thread's repository.
    pub fn user_key(&self) -> UserKey {
        UserKey {
            client: self.client.clone(),
            user: self.user.clone(),
        }
    }

    /// `thread/{client}/{user}/{thread}`.
    pub fn branch(&self) -> String {
        format!("thread/{}/{}/{}", self.client, self.user, self.thread)
    }

    /// The thread's host label: a readable beginning and 12 hex digits of SHA-256 of
    /// `client/user/thread`; lower case, at most 63 characters (one DNS label, RFC 1035 2.3.4).
    /// The digest is taken of the ids as they are, so ids that differ in case differ here.
    pub fn slug(&self) -> String {
        let digest = hex::encode(&Sha256::digest(self.to_string())[..6]);
        let mut readable = String::new();
        for part in [
            self.client.as_str(),
            self.user.as_str(),
            self.thread.as_str(),
        ] {
            if !readable.is_empty() {
                readable.push('-');
            }
            readable.extend(part.chars().map(|c| match c {
                '.' | '_' => '-',
                c => c.to_ascii_lowercase(),
            }));
        }
        readable.truncate(63 - 1 - digest.len());
        format!("{}-{digest}", readable.trim_end_matches('-'))
    }
}

impl fmt::Display for ThreadKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{}", self.client, self.user, self.thread)
    }
}

/// One turn. It carries its thread's key (`client~user~thread~sequence`), so a turn is found on
/// the workspace without an index and without an earlier init; `~` is in no id and needs no
/// escaping in a URL (RFC 3986 2.3). The sequence is a UUIDv7, so turn ids of a thread sort by
/// age.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct TurnId {
    key: ThreadKey,
    sequence: String,
}

/// A text that is no turn id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("that is not the id of a turn")]
pub struct InvalidTurnId;

impl TurnId {
    /// A new id, later than every one made before by this process.
    pub fn new(key: &ThreadKey) -> Self {
        Self {
            key: key.clone(),
            sequence: uuid::Uuid::now_v7().simple().to_string(),
        }
    }

    /// The turn of a thread whose unique part is known.
    ///
    /// # Errors
    /// [`InvalidTurnId`] if that is none.
    pub fn of_sequence(key: &ThreadKey, sequence: &str) -> Result<Self, InvalidTurnId> {
        let is_sequence = sequence.len() == 32
            && sequence
                .bytes()
                .all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
        if !is_sequence {
            return Err(InvalidTurnId);
        }
        Ok(Self {
            key: key.clone(),
            sequence: sequence.to_owned(),
        })
    }

    /// The thread that the turn belongs to.
    pub fn key(&self) -> &ThreadKey {
        &self.key
    }

    /// The part that is unique within the thread; safe as a file name.
    pub fn sequence(&self) -> &str {
        &self.sequence
    }
}

impl FromStr for TurnId {
    type Err = InvalidTurnId;
    fn from_str(text: &str) -> Result<Self, InvalidTurnId> {
        let mut parts = text.split('~');
        let (Some(client), Some(user), Some(thread), Some(sequence), None) = (
            parts.next(),
            parts.next(),
            parts.next(),
            parts.next(),
            parts.next(),
        ) else {
            return Err(InvalidTurnId);
        };
        let key = ThreadKey::parse(client, user, thread).map_err(|_| InvalidTurnId)?;
        Self::of_sequence(&key, sequence)
    }
}

impl TryFrom<String> for TurnId {
    type Error = InvalidTurnId;
    fn try_from(text: String) -> Result<Self, InvalidTurnId> {
        text.parse()
    }
}

impl From<TurnId> for String {
    fn from(id: TurnId) -> String {
        id.to_string()
    }
}

impl fmt::Display for TurnId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ThreadKey {
            client,
            user,
            thread,
        } = &self.key;
        write!(f, "{client}~{user}~{thread}~{}", self.sequence)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_follow_the_contract() {
        let longest = "a".repeat(64);
        for good in ["a", "A.b_c-9", "0", &longest, "lock", "a.locks", "x-"] {
            assert!(good.parse::<ClientId>().is_ok(), "{good:?} is allowed");
        }
        let too_long = "a".repeat(65);
        for bad in [
            "", ".a", "-a", "_a", "a..b", "a.", "a.lock", "a/b", "a b", "ä", "a\0", "a\n", "..",
            "~", "a~b", &too_long,
        ] {
            assert_eq!(
                bad.parse::<UserId>(),
                Err(InvalidId { field: "userId" }),
                "{bad:?}"
            );
        }
    }

    #[test]
    fn slug_is_one_dns_label_and_tells_case_apart() {
        let key = |t: &str| ThreadKey::parse("Acme.Co", "al_ice", t).unwrap();
        let slug = key("Main").slug();
        assert!(slug.starts_with("acme-co-al-ice-main-"), "{slug}");
        assert_eq!(key("Main").slug(), slug, "it never changes");
        assert_ne!(key("main").slug(), slug);
        let long = ThreadKey::parse(&"a".repeat(64), &"b".repeat(64), "t")
            .unwrap()
            .slug();
        assert!(long.len() <= 63 && !long.contains("--"), "{long}");
    }

    #[test]
    fn turn_ids_carry_their_thread() {
        let key = ThreadKey::parse("acme", "alice", "main").unwrap();
        let id = TurnId::new(&key);
        let back: TurnId = id.to_string().parse().unwrap();
        assert_eq!((back.key(), back.sequence()), (&key, id.sequence()));
        assert!(TurnId::new(&key) > id, "later turns sort later");
        for bad in [
            "",
            "a~b~c",
            "a~b~c~../../x",
            "a~b~c~0~1",
            "~~~",
            "a~b~c~XYZ",
        ] {
            assert_eq!(bad.parse::<TurnId>(), Err(InvalidTurnId), "{bad:?}");
        }
    }
}
