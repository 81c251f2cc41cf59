//! Errors by name: `io.litefs.LiteFS1.Error.*`, and those of the bus itself for who may do what.

use crate::status::ViewError;
use zbus::message::{Header, Message};
use zbus::names::ErrorName;

/// Prefix of our own errors.
pub const PREFIX: &str = "io.litefs.LiteFS1.Error.";

/// Why a method did not do what it was asked for.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct BusError {
    name: String,
    message: String,
}

/// Names of all errors of our own, for the documentation.
pub const NAMES: [(&str, &str); 10] = [
    ("NoSuchDatabase", "There is no database of that name on this host."),
    ("NotPrimary", "Only the primary can do that; the message names it when it is known."),
    (
        "HandoffFailed",
        "The lease did not go to another host: there is none that can take it, or the lease's store does not answer.",
    ),
    (
        "StaticLease",
        "The configuration names the primary, and only it changes that: see lease.role in litefs.toml(5).",
    ),
    ("Quarantined", "The database cannot be trusted and stands aside; the message says why."),
    ("Busy", "Others held what is needed for too long; nothing was changed. Try again."),
    ("ChecksumMismatch", "What is on disk is not what the position says."),
    ("BadDatabase", "The file is no database that can be replicated."),
    (
        "BadConfiguration",
        "The configuration has mistakes, all of them in the message; the old one stays in effect.",
    ),
    ("Failed", "Anything else; the message says what and why."),
];

impl BusError {
    fn own(name: &str, message: impl ToString) -> BusError {
        BusError { name: format!("{PREFIX}{name}"), message: message.to_string() }
    }

    /// Anything else.
    pub fn failed(message: impl ToString) -> BusError {
        BusError::own("Failed", message)
    }

    /// An argument makes no sense.
    pub fn invalid(message: impl ToString) -> BusError {
        BusError { name: "org.freedesktop.DBus.Error.InvalidArgs".into(), message: message.to_string() }
    }

    /// The caller may not do it.
    pub fn denied(message: impl ToString) -> BusError {
        BusError { name: "org.freedesktop.DBus.Error.AccessDenied".into(), message: message.to_string() }
    }

    /// The caller might be allowed after being asked for a password, but did not say that it can wait for that.
    pub fn interaction_required(message: impl ToString) -> BusError {
        let name = "org.freedesktop.DBus.Error.InteractiveAuthorizationRequired";
        BusError { name: name.into(), message: message.to_string() }
    }
}

impl From<ViewError> for BusError {
    fn from(error: ViewError) -> Self {
        let name = match &error {
            ViewError::NoSuchDatabase(_) => "NoSuchDatabase",
            ViewError::NotPrimary { .. } => "NotPrimary",
            ViewError::StaticLease(_) => "StaticLease",
            ViewError::Handoff(_) => "HandoffFailed",
            ViewError::HaltLock(_) => "HaltLock",
            ViewError::Quarantined { .. } => "Quarantined",
            ViewError::Busy(_) => "Busy",
            ViewError::Damaged(_) => "ChecksumMismatch",
            ViewError::BadDatabase(_) => "BadDatabase",
            ViewError::BadConfiguration(_) => "BadConfiguration",
            ViewError::Other(_) => "Failed",
        };
        BusError::own(name, error)
    }
}

impl From<zbus::Error> for BusError {
    fn from(error: zbus::Error) -> Self {
        BusError::failed(error)
    }
}

impl zbus::DBusError for BusError {
    fn create_reply(&self, call: &Header<'_>) -> zbus::Result<Message> {
        Message::error(call, self.name()).build(&(&self.message,))
    }

    fn name(&self) -> ErrorName<'_> {
        ErrorName::from_str_unchecked(&self.name)
    }

    fn description(&self) -> Option<&str> {
        Some(&self.message)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use zbus::DBusError;

    #[test]
    fn every_name_is_valid_and_documented() {
        for (name, text) in NAMES {
            let error = BusError::own(name, "why");
            assert!(ErrorName::try_from(error.name().as_str()).is_ok());
            assert!(text.ends_with('.'));
        }
        let error = BusError::from(ViewError::Other("why".into()));
        assert_eq!(error.name().as_str(), "io.litefs.LiteFS1.Error.Failed");
        assert_eq!(error.description(), Some("why"));
    }
}
