//! Who may call methods that change something: root, and whoever polkit allows.

use super::error::BusError;
use std::collections::HashMap;
use zbus::Connection;
use zbus::Variant;
use zbus::fdo::DBusProxy;
use zbus::message::{Flags, Header};

/// What polkit is asked about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Become the primary.
    Promote,
    /// Give the lease to another host.
    Handoff,
    /// Stop being the primary.
    Demote,
    /// Read the configuration again.
    Reload,
    /// Move the WAL into the database, make files durable.
    Checkpoint,
    /// Write a snapshot file.
    Snapshot,
    /// Read a whole database and compare.
    Verify,
    /// Get a copy of a database's content.
    Export,
}

impl Action {
    /// All of them.
    pub const ALL: [Action; 8] = [
        Action::Promote,
        Action::Handoff,
        Action::Demote,
        Action::Reload,
        Action::Checkpoint,
        Action::Snapshot,
        Action::Verify,
        Action::Export,
    ];

    /// Its name for polkit, as in `/usr/share/polkit-1/actions/io.litefs.LiteFS1.policy`.
    pub fn id(self) -> &'static str {
        match self {
            Action::Promote => "io.litefs.LiteFS1.promote",
            Action::Handoff => "io.litefs.LiteFS1.handoff",
            Action::Demote => "io.litefs.LiteFS1.demote",
            Action::Reload => "io.litefs.LiteFS1.reload",
            Action::Checkpoint => "io.litefs.LiteFS1.checkpoint",
            Action::Snapshot => "io.litefs.LiteFS1.snapshot",
            Action::Verify => "io.litefs.LiteFS1.verify",
            Action::Export => "io.litefs.LiteFS1.export",
        }
    }
}

/// Flag of `CheckAuthorization`: the user may be asked.
const ALLOW_USER_INTERACTION: u32 = 1;

#[zbus::proxy(
    interface = "org.freedesktop.PolicyKit1.Authority",
    default_service = "org.freedesktop.PolicyKit1",
    default_path = "/org/freedesktop/PolicyKit1/Authority"
)]
trait Authority {
    /// Answers (authorized, challenge, details).
    fn check_authorization(
        &self,
        subject: &(&str, HashMap<&str, Variant<'_>>),
        action_id: &str,
        details: HashMap<&str, &str>,
        flags: u32,
        cancellation_id: &str,
    ) -> zbus::Result<(bool, bool, HashMap<String, String>)>;
}

/// Lets the caller of a method pass, or says why not. Without polkit root may do everything and others nothing.
pub async fn authorize(
    connection: &Connection,
    header: &Header<'_>,
    action: Action,
    details: HashMap<&str, &str>,
) -> Result<(), BusError> {
    if !connection.is_bus() {
        // Whoever holds the other end of a private connection was given it; there is no bus to tell who it is.
        return Ok(());
    }
    let sender = header.sender().ok_or_else(|| BusError::denied("the caller has no name on the bus"))?;
    let bus = DBusProxy::new(connection).await?;
    let uid = bus
        .get_connection_unix_user(sender.clone().into())
        .await
        .map_err(|error| BusError::denied(format!("the bus does not say who {sender} is: {error}")))?;
    if uid == 0 {
        return Ok(());
    }
    let interactive = header.primary().flags().contains(Flags::ALLOW_INTERACTIVE_AUTH);
    let flags = if interactive { ALLOW_USER_INTERACTION } else { 0 };
    let subject = ("system-bus-name", HashMap::from([("name", Variant::from(sender.as_str()))]));
    let asked = AuthorityProxy::new(connection).await?;
    match asked.check_authorization(&subject, action.id(), details, flags, "").await {
        Ok((true, _, _)) => Ok(()),
        Ok((false, true, _)) if !interactive => Err(BusError::interaction_required(format!(
            "{} needs a password; allow interactive authorization, or run it as root",
            action.id()
        ))),
        Ok(_) => Err(BusError::denied(format!("polkit does not allow user {uid} {}", action.id()))),
        Err(error) => {
            Err(BusError::denied(format!("polkit cannot be asked, so only root may do this: {error}")))
        }
    }
}
