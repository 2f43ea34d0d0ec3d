//! Who a model request is charged to.

use std::{borrow::Cow, fmt};

use serde::{Deserialize, Serialize};

use crate::identity::{ClientId, ThreadId, TurnId, UserId};

/// Whose money a run spends, and what kind of run it is. Serialised as it stands in the ledger.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Account {
    /// `turn`, `gateway` (another container's CLI), …: open, readers must not choke on new ones.
    pub kind: Cow<'static, str>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub client: Option<ClientId>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<UserId>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub thread: Option<ThreadId>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub turn: Option<TurnId>,
}

impl Account {
    /// The kind of a turn's run.
    pub const TURN: &str = "turn";
    /// The kind of a request that came in over the network.
    pub const GATEWAY: &str = "gateway";
    /// The kind of a one-shot run for another service.
    pub const SERVICE: &str = "service";
    /// The kind of a health check that asks the model.
    pub const HEALTH: &str = "health";
    /// The kind of a run that labels an image.
    pub const LABEL: &str = "label";
    /// The kind of a prediction that makes an image: paid at Replicate, not at the model API.
    pub const IMAGES: &str = "images";
    /// The kind of the CLI on somebody's terminal.
    pub const CLI: &str = "cli";

    /// Of one turn.
    pub fn turn(id: &TurnId) -> Self {
        let key = id.key();
        Self {
            kind: Self::TURN.into(),
            client: Some(key.client.clone()),
            user: Some(key.user.clone()),
            thread: Some(key.thread.clone()),
            turn: Some(id.clone()),
        }
    }

    /// Of nobody in particular.
    pub fn of_kind(kind: impl Into<Cow<'static, str>>) -> Self {
        Self {
            kind: kind.into(),
            client: None,
            user: None,
            thread: None,
            turn: None,
        }
    }
}

/// For the log: the turn, else the kind and whose it is.
impl fmt::Display for Account {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(turn) = &self.turn {
            return write!(f, "{turn}");
        }
        f.write_str(&self.kind)?;
        for id in [
            self.client.as_ref().map(ClientId::as_str),
            self.user.as_ref().map(UserId::as_str),
            self.thread.as_ref().map(ThreadId::as_str),
        ]
        .into_iter()
        .flatten()
        {
            write!(f, " {id}")?;
        }
        Ok(())
    }
}
