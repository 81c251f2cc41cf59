//! What role a host has.

use crate::host::Host;

impl Host {
    /// Whether it is the primary, by its own status.
    pub fn is_primary(&self) -> bool {
        self.try_status().is_some_and(|status| status["role"]["name"] == "primary")
    }

    /// Whether it follows that host, over a connection that stands.
    pub fn follows(&self, upstream: &Host) -> bool {
        self.try_status().is_some_and(|status| {
            let role = &status["role"];
            role["name"] == "replica"
                && role["upstream"]["hostname"] == upstream.name()
                && role["upstream"]["connected"] == true
        })
    }

    /// Waits until it has this role.
    #[track_caller]
    pub fn wait_role(&self, role: &str) {
        self.wait_for(&format!("the role is {role}"), || self.status()["role"]["name"] == role);
    }

    /// Epoch of the newest term that it knows.
    pub fn epoch(&self) -> u64 {
        self.status()["role"]["epoch"].as_u64().expect("an epoch is a number")
    }

    /// Why it does not become primary, when there is none.
    pub fn waits(&self) -> String {
        let status = self.try_status().unwrap_or_default();
        status["role"]["waits"].as_str().unwrap_or_default().to_owned()
    }
}
