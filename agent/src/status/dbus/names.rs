//! Names on the bus: of the service, of its objects, and back.

use crate::DatabaseName;
use std::fmt::Write;

/// The manager's object; the databases are below it.
pub const MANAGER_PATH: &str = "/io/litefs/LiteFS1";

/// Interface of the manager.
pub const MANAGER_INTERFACE: &str = "io.litefs.LiteFS1.Manager";

/// Interface of a database.
pub const DATABASE_INTERFACE: &str = "io.litefs.LiteFS1.Database";

/// The service's well-known name. A cluster's name is a valid element of it (see `check_cluster` of the configuration).
pub fn bus_name(cluster: &str) -> String {
    format!("io.litefs.LiteFS1.{cluster}")
}

/// A database's object: each byte that is no ASCII letter or digit is written `_` and two hex digits, as systemd does
/// for units (`app.db` is `app_2edb`).
pub fn object_path(name: &DatabaseName) -> String {
    let mut path = format!("{MANAGER_PATH}/databases/");
    for byte in name.as_str().bytes() {
        if byte.is_ascii_alphanumeric() {
            path.push(char::from(byte));
        } else {
            // Writing to a string does not fail.
            let _ = write!(path, "_{byte:02x}");
        }
    }
    path
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn names_become_elements_of_paths() {
        let path = |name: &str| object_path(&DatabaseName::new(name).unwrap());
        assert_eq!(path("app.db"), "/io/litefs/LiteFS1/databases/app_2edb");
        assert_eq!(path("app/users.db"), "/io/litefs/LiteFS1/databases/app_2fusers_2edb");
        assert_eq!(path("ä"), "/io/litefs/LiteFS1/databases/_c3_a4");
        assert_eq!(bus_name("shop-2"), "io.litefs.LiteFS1.shop-2");
        assert!(zbus::names::WellKnownName::try_from(bus_name("a_b-9")).is_ok());
    }

    proptest! {
        #[test]
        fn different_names_have_different_valid_paths(a in "[a-c_./é]{1,6}", b in "[a-c_./é]{1,6}") {
            let (Ok(a), Ok(b)) = (DatabaseName::new(&a), DatabaseName::new(&b)) else { return Ok(()) };
            prop_assert_eq!(a == b, object_path(&a) == object_path(&b));
            prop_assert!(zbus::ObjectPath::try_from(object_path(&a)).is_ok());
        }
    }
}
