//! The network of a fleet: a bridge in a namespace of its own, which goes with the process that holds it.

use crate::process::{output, spawn_bound};
use anyhow::{Context, Result, bail};
use std::net::Ipv4Addr;
use std::process::{Child, Command, Stdio};

/// A switch with a port per host.
#[derive(Debug)]
pub struct Switch {
    holder: Child,
}

impl Switch {
    pub fn start() -> Result<Switch> {
        let holder = spawn_bound("unshare", &["--net", "cat"], |command| {
            command.stdin(Stdio::piped()).stdout(Stdio::null());
        })?;
        let switch = Switch { holder };
        let own = std::fs::read_link("/proc/self/ns/net")?;
        let theirs = format!("/proc/{}/ns/net", switch.holder.id());
        let moved = crate::wait::until(crate::PATIENCE, || {
            std::fs::read_link(&theirs).ok().filter(|namespace| *namespace != own)
        });
        if moved.is_none() {
            bail!("cannot make a network namespace; run as root where namespaces are allowed");
        }
        switch.ip("link add switch type bridge")?;
        switch.ip("link set switch up")?;
        Ok(switch)
    }

    /// Runs `ip` at the switch.
    fn ip(&self, args: &str) -> Result<()> {
        ip(self.holder.id(), args)
    }

    /// Plugs the network namespace of a process into a port.
    pub fn plug(&self, port: usize, pid: u32) -> Result<()> {
        // What a host that is gone left behind; often there is nothing.
        let _ = self.ip(&format!("link delete port{port}"));
        self.ip(&format!("link add port{port} type veth peer name eth0 netns {pid}"))
            .context("cannot make a veth pair")?;
        self.ip(&format!("link set port{port} master switch up"))?;
        ip(pid, &format!("address add {}/24 dev eth0", address(port)))?;
        ip(pid, "link set eth0 up")
    }

    /// Cuts or heals a port.
    pub fn set_up(&self, port: usize, up: bool) -> Result<()> {
        self.ip(&format!("link set port{port} {}", if up { "up" } else { "down" }))
    }

    /// Ports that are apart reach those that are not, but not each other.
    pub fn set_apart(&self, port: usize, apart: bool) -> Result<()> {
        let isolated = if apart { "on" } else { "off" };
        self.ip(&format!("link set port{port} type bridge_slave isolated {isolated}"))
    }
}

impl Drop for Switch {
    fn drop(&mut self) {
        let _ = self.holder.kill();
        let _ = self.holder.wait();
    }
}

/// Address of the host at a port.
pub fn address(port: usize) -> Ipv4Addr {
    Ipv4Addr::new(10, 77, 0, u8::try_from(port + 1).unwrap_or(u8::MAX))
}

fn ip(pid: u32, args: &str) -> Result<()> {
    let mut command = Command::new("nsenter");
    command.args(["--net", "--target", &pid.to_string(), "ip"]).args(args.split(' '));
    output(&mut command).map(|_| ())
}
