//! One line of the ledger.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::Tokens;
use crate::{domain::Account, lease::Owner};

/// A line: what it is, when, and of which request.
///
/// A request has a `reserved` line, written before it goes up, and at most one more, which
/// replaces it. All lines of a request carry the time of the first, so that a request belongs to
/// one day whenever it ended. They are in one file, unless its process died and another one found
/// out how it ended: then the last line is in that one's file of the same day, and may be read first.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "status", rename_all = "camelCase")]
pub(super) enum Row {
    /// The first line of a file: who writes it.
    #[serde(rename_all = "camelCase")]
    Opened { at: Timestamp, owner: Owner },
    /// Tokens and cost are the most that the request may come to.
    Reserved(Request),
    /// Counted to its end.
    Settled(Request),
    /// Cut off, by whichever side; tokens are what was seen of it.
    Aborted(Request),
    /// The upstream did not take it: it costs nothing.
    Refused(Request),
    /// Of a newer version: passed over.
    #[serde(other)]
    Unknown,
}

/// A request as far as it is known.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Request {
    pub(super) at: Timestamp,
    /// Ours, unique in all ledgers.
    pub(super) id: String,
    #[serde(flatten)]
    pub(super) account: Account,
    pub(super) model: String,
    /// The provider's id of the answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) message: Option<String>,
    #[serde(flatten)]
    pub(super) tokens: Tokens,
    pub(super) cost_usd: f64,
    /// From the first line to the last.
    #[serde(default)]
    pub(super) duration_ms: u64,
    /// Some of the tokens were not told but reckoned from the bytes that passed.
    #[serde(default, skip_serializing_if = "is_false")]
    pub(super) is_estimated: bool,
    /// The price table does not know the model.
    #[serde(default, skip_serializing_if = "is_false")]
    pub(super) is_unpriced: bool,
    /// Nobody knows what it costs, and it counts nothing.
    #[serde(default, skip_serializing_if = "is_false")]
    pub(super) is_uncounted: bool,
}

fn is_false(flag: &bool) -> bool {
    !flag
}

impl Row {
    /// With a line feed.
    pub(super) fn line(&self) -> Vec<u8> {
        let mut line = serde_json::to_vec(self).expect("plain data serialises");
        line.push(b'\n');
        line
    }

    /// `None`: no line of ours, or half of one.
    pub(super) fn parse(line: &[u8]) -> Option<Self> {
        serde_json::from_slice(line).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::{ThreadKey, TurnId};

    #[test]
    fn a_line_is_flat_and_comes_back_as_it_was() {
        let turn = TurnId::new(&ThreadKey::parse("acme", "alice", "main").unwrap());
        let row = Row::Settled(Request {
            at: "2026-11-21T10:00:00Z".parse().unwrap(),
            id: "r".into(),
            account: Account::turn(&turn),
            model: "claude-sonnet-5".into(),
            message: Some("msg_1".into()),
            tokens: Tokens {
                input: 1,
                output: 2,
                cache_read: 3,
                cache_write_5m: 4,
                cache_write_1h: 5,
            },
            cost_usd: 0.25,
            duration_ms: 7,
            is_estimated: false,
            is_unpriced: false,
            is_uncounted: false,
        });
        let line = row.line();
        assert_eq!(Row::parse(&line), Some(row));
        let json: serde_json::Value = serde_json::from_slice(&line).unwrap();
        for (field, value) in [
            ("status", "settled".into()),
            ("kind", "turn".into()),
            ("client", "acme".into()),
            ("turn", turn.to_string().into()),
            ("cacheWrite1hTokens", serde_json::json!(5)),
            ("costUsd", serde_json::json!(0.25)),
        ] {
            assert_eq!(json[field], value, "{field}");
        }
        assert_eq!(
            Row::parse(br#"{"status":"minted","x":1}"#),
            Some(Row::Unknown)
        );
        assert_eq!(Row::parse(&line[..line.len() / 2]), None);
        assert!(
            Row::parse(
                &Row::Opened {
                    at: Timestamp::now(),
                    owner: Owner::this().clone()
                }
                .line()
            )
            .is_some()
        );
    }
}
