//! What this host offers.

use super::finding::Findings;
use super::library;
use super::world::World;
use crate::status::api::RoleName;
use std::fs::OpenOptions;
use std::path::Path;
use std::process::Command;

/// First kernel with FUSE passthrough.
const PASSTHROUGH_SINCE: (u32, u32) = (6, 9);

/// First systemd that keeps descriptors of a service over its restart when told so (`FileDescriptorStorePreserve=`).
const SYSTEMD_SINCE: u32 = 254;

/// Looks at kernel, FUSE, the shim, systemd and the agent.
pub fn check(world: &World) -> Findings {
    let mut findings = Findings::about("host");
    let fuse = fuse(&mut findings);
    kernel(&mut findings, world, fuse);
    match library::find() {
        Ok(path) => findings.ok("shim", path.display().to_string()),
        Err(why) if fuse => findings.warn("shim", why, "only the preload door needs it"),
        Err(why) => findings.fail("shim", why, "without /dev/fuse there is no other door"),
    }
    systemd(&mut findings);
    agent(&mut findings, world);
    findings
}

fn fuse(findings: &mut Findings) -> bool {
    let device = Path::new("/dev/fuse");
    match OpenOptions::new().read(true).write(true).open(device) {
        Ok(_) => {
            findings.ok("fuse", "/dev/fuse works");
            true
        }
        Err(error) => {
            findings.warn(
                "fuse",
                format!("cannot open /dev/fuse: {error}"),
                "modprobe fuse (in a container: --device /dev/fuse --cap-add SYS_ADMIN), or use the preload door",
            );
            false
        }
    }
}

/// `(major, minor)` of a release such as `6.18.2-cloud`.
fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

fn kernel(findings: &mut Findings, world: &World, fuse: bool) {
    let release = nix::sys::utsname::uname()
        .map(|name| name.release().to_string_lossy().into_owned())
        .unwrap_or_default();
    let new_enough = version(&release).is_some_and(|version| version >= PASSTHROUGH_SINCE);
    findings.ok("kernel", format!("Linux {release}"));
    let in_use = world.agent.as_ref().is_ok_and(|status| status.mount.passthrough);
    let serves_fuse = world.agent.as_ref().is_ok_and(|status| status.mount.door == "fuse");
    match () {
        () if in_use => findings.ok("passthrough", "in use"),
        () if serves_fuse && new_enough => findings.warn(
            "passthrough",
            "the kernel knows it, but the agent does not use it",
            "the agent needs CAP_SYS_ADMIN, mount.passthrough = \"auto\" and an ordinary file system below data.dir",
        ),
        () if new_enough && fuse => findings.ok("passthrough", "the kernel knows it"),
        () if fuse => findings.warn(
            "passthrough",
            "the kernel is older than 6.9 and has no FUSE passthrough",
            "reads through the FUSE door are slower; everything works",
        ),
        () => {}
    }
}

fn systemd(findings: &mut Findings) {
    let output = Command::new("systemctl").arg("--version").output();
    let text = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
    // "systemd 252 (252.39-1~deb12u1)"
    let found = text.split_whitespace().nth(1).and_then(|number| number.parse::<u32>().ok());
    let booted = Path::new("/run/systemd/system").is_dir();
    match found {
        Some(number) if booted && number >= SYSTEMD_SINCE => findings.ok("systemd", format!("systemd {number}")),
        Some(number) if booted => findings.ok(
            "systemd",
            format!("systemd {number}; keeps mounts over restarts of the agent, not over a stop (since {SYSTEMD_SINCE})"),
        ),
        Some(number) => findings.warn(
            "systemd",
            format!("systemd {number} is installed, but does not run this host"),
            "something else has to start the agent again when it ends",
        ),
        None => findings.warn(
            "systemd",
            "not there",
            "something else has to start the agent again when it ends",
        ),
    }
}

fn agent(findings: &mut Findings, world: &World) {
    match &world.agent {
        Ok(status) => {
            findings.ok("agent", format!("litefs {} serves cluster {}", status.node.version, status.cluster));
            let dir = status.mount.dir.display();
            match status.mount.door.as_str() {
                "preload" => findings
                    .ok("door", format!("preload: programs that use {dir} are started with `litefs exec`")),
                door => findings.ok("door", format!("{door}, at {dir}")),
            }
            match status.role.name {
                RoleName::None => findings.warn(
                    "role",
                    "neither primary nor replica: writes are refused",
                    "see `litefs status`",
                ),
                role => findings.ok("role", role.as_str()),
            }
        }
        Err(failure) => {
            let (what, advice) =
                failure.message.split_once("\n  help: ").unwrap_or((&failure.message, "see its log"));
            findings.warn("agent", what, advice);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::version;

    #[test]
    fn versions_of_kernels_are_compared_as_numbers() {
        assert_eq!(version("6.18.2-cloud"), Some((6, 18)));
        assert_eq!(version("6.1.0-37-amd64"), Some((6, 1)));
        assert!(version("6.18") > Some((6, 9)));
        assert_eq!(version("none"), None);
    }
}
