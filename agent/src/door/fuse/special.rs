//! Contents of the special files, byte for byte as LiteFS has them.

use super::inodes::Special;
use crate::database::Database;

/// What the special files show of the node's role.
pub trait RoleView: Send + Sync + 'static {
    /// Host name of the primary this node follows, while connected; `None` on the primary itself.
    fn primary_hostname(&self) -> Option<String>;
    /// Milliseconds behind the primary: 0 on the primary, `None` before anything was heard of it.
    fn lag_ms(&self) -> Option<i64>;
}

impl std::fmt::Debug for dyn RoleView {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("RoleView")
    }
}

/// Shown when the lag is not known yet.
const LAG_UNKNOWN_MS: i64 = i32::MAX as i64;

impl Special {
    /// The file's content now; `None` when the file is not there now.
    pub fn content(&self, view: &dyn RoleView) -> Option<Vec<u8>> {
        match self {
            Special::Primary => view.primary_hostname().map(|host| format!("{host}\n").into_bytes()),
            Special::Lag => {
                let ms = view.lag_ms().unwrap_or(LAG_UNKNOWN_MS).clamp(-LAG_UNKNOWN_MS, LAG_UNKNOWN_MS);
                Some(format!("{ms:+010}\n").into_bytes())
            }
            Special::Position(db) => Some(position_text(db)),
            Special::Lock(_) => Some(Vec::new()),
        }
    }
}

/// `<TXID>/<post-apply checksum>` in hex, one line of 34 bytes.
fn position_text(db: &Database) -> Vec<u8> {
    format!("{}\n", db.visible_position()).into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    struct View(Option<i64>);
    impl RoleView for View {
        fn primary_hostname(&self) -> Option<String> {
            Some("node1".into())
        }
        fn lag_ms(&self) -> Option<i64> {
            self.0
        }
    }

    #[test]
    fn contents_are_as_in_litefs() {
        let text = |s: Special, v: Option<i64>| String::from_utf8(s.content(&View(v)).unwrap()).unwrap();
        assert_eq!(text(Special::Primary, None), "node1\n");
        assert_eq!(text(Special::Lag, Some(0)), "+000000000\n");
        assert_eq!(text(Special::Lag, Some(1234)), "+000001234\n");
        assert_eq!(text(Special::Lag, None), "+2147483647\n");
    }
}
