//! Networks that can be cut: each host has a network namespace of its own, and a cable to a bridge where Consul is.

use crate::binary::litefs;
use crate::host::Host;
use crate::shell::run;
use std::fs;
use std::net::Ipv4Addr;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicU8, Ordering};

/// Port of every host's agent.
const PORT: u16 = 20202;

fn ip(arguments: &[&str]) {
    run(Command::new("ip").args(arguments));
}

/// A bridge and what is plugged into it. Taken away when it is dropped.
#[derive(Debug)]
pub struct Network {
    bridge: String,
    subnet: [u8; 3],
    spaces: Vec<String>,
}

impl Network {
    /// An empty one, of its own.
    pub fn new() -> Network {
        static COUNT: AtomicU8 = AtomicU8::new(0);
        let pid = std::process::id();
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let bridge = format!("lft{pid:x}x{count:x}");
        // 198.18.0.0/15 is for tests of networks (RFC 2544).
        let subnet = [198, 18 + (pid / 250 % 2) as u8, (pid % 250) as u8 ^ count];
        let network = Network { bridge, subnet, spaces: Vec::new() };
        ip(&["link", "add", &network.bridge, "type", "bridge"]);
        ip(&["address", "add", &format!("{}/24", network.address(1)), "dev", &network.bridge]);
        ip(&["link", "set", &network.bridge, "up"]);
        network
    }

    fn address(&self, last: u8) -> Ipv4Addr {
        let [a, b, c] = self.subnet;
        Ipv4Addr::new(a, b, c, last)
    }

    /// Where the bridge itself is: for Consul.
    pub fn hub(&self) -> Ipv4Addr {
        self.address(1)
    }

    /// Plugs a host in that has not been started: its agent runs in a namespace of its own.
    pub fn plug(&mut self, host: &Host, scratch: &Path) {
        let number = u8::try_from(self.spaces.len()).expect("a few hosts");
        let (space, cable) = (format!("{}-{number}", self.bridge), self.cable(usize::from(number)));
        let inside = format!("{cable}i");
        let address = self.address(10 + number);
        ip(&["netns", "add", &space]);
        self.spaces.push(space.clone());
        ip(&["link", "add", &cable, "type", "veth", "peer", "name", &inside, "netns", &space]);
        ip(&["link", "set", &cable, "master", &self.bridge, "up"]);
        ip(&["-n", &space, "address", "add", &format!("{address}/24"), "dev", &inside]);
        ip(&["-n", &space, "link", "set", &inside, "up"]);
        ip(&["-n", &space, "link", "set", "lo", "up"]);
        // Only the network is the host's own: mounts are those of the test.
        let program = scratch.join(format!("litefs-on-{}", host.name()));
        let script =
            format!("#!/bin/sh\nexec nsenter --net=/run/netns/{space} {} \"$@\"\n", litefs().display());
        fs::write(&program, script).expect("the scratch directory is writable");
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).expect("it is ours");
        host.use_binary(&program);
        host.set(&format!("http.listen={address}:{PORT}"));
        host.set(&format!("http.advertise-url=http://{address}:{PORT}"));
    }

    fn cable(&self, number: usize) -> String {
        format!("{}c{number}", self.bridge)
    }

    /// Cuts the cable of a host (counted as they were plugged in), or mends it.
    pub fn cut(&self, number: usize, cut: bool) {
        ip(&["link", "set", &self.cable(number), if cut { "down" } else { "up" }]);
    }

    /// Hosts that are apart reach Consul and those that are not apart, but not each other.
    pub fn set_apart(&self, number: usize, apart: bool) {
        let isolated = if apart { "on" } else { "off" };
        ip(&["link", "set", &self.cable(number), "type", "bridge_slave", "isolated", isolated]);
    }
}

impl Default for Network {
    fn default() -> Self {
        Network::new()
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        for space in &self.spaces {
            let _ = Command::new("ip").args(["netns", "delete", space]).status();
        }
        for number in 0..self.spaces.len() {
            let _ = Command::new("ip")
                .args(["link", "delete", &self.cable(number)])
                .stderr(std::process::Stdio::null())
                .status();
        }
        let _ = Command::new("ip").args(["link", "delete", &self.bridge]).status();
    }
}
