//! The hosts themselves: what all other tests of this directory stand on.

use fleet::Fleet;
use std::path::Path;

#[test]
fn hosts_boot_reach_each_other_and_come_back() {
    let fleet = Fleet::new(2);
    let (a, b) = (&fleet[0], &fleet[1]);
    assert_eq!(a.run("cat /proc/1/comm"), "systemd\n");
    assert_eq!(b.run("hostname"), "host-b\n");
    assert_ne!(a.run("cat /etc/machine-id"), b.run("cat /etc/machine-id"));

    // One connection from a to b that only a network can make.
    let listen = "python3 -c 'import socket; s=socket.create_server((\"\", 7)); c=s.accept()[0]; c.sendall(b\"hello\")'";
    b.run(&format!("systemd-run --unit=listen {listen}"));
    let connect = "python3 -c 'import socket; print(socket.create_connection((\"host-b\", 7), 2).recv(9))'";
    b.cut();
    assert!(!a.try_run(connect).expect("host a is on").success(), "a cut link carried something");
    b.heal();
    assert_eq!(a.wait_for(connect), "b'hello'\n");

    let boot_id = a.run("cat /proc/sys/kernel/random/boot_id");
    a.push("/var/kept", "kept");
    a.push("/tmp/lost", "lost");
    a.power_off();
    assert!(a.try_run("true").is_err(), "a host that is off ran something");
    assert_eq!(a.boot(), "running");
    assert_eq!(a.pull("/var/kept"), b"kept");
    assert!(!a.try_run("cat /tmp/lost").expect("host a is on").success());
    assert_ne!(boot_id, a.run("cat /proc/sys/kernel/random/boot_id"));
    assert_eq!(a.run("ip -brief address show eth0").split_whitespace().nth(2), Some("10.77.0.1/24"));
}

#[test]
fn nothing_is_left_behind() {
    let pid = {
        let fleet = Fleet::new(1);
        // As seen from outside: the host's only `sleep` of this length.
        fleet[0].run("systemd-run --unit=sleep --service-type=exec sleep 7654321");
        find_process("7654321").expect("the process is visible from outside")
    };
    assert!(!Path::new("/proc").join(&pid).exists(), "a process of a host that is gone still runs");
    let mounts = std::fs::read_to_string("/proc/self/mounts").expect("there are mounts");
    assert!(!mounts.contains("/fleet/hosts/"), "a host's file system is still mounted: {mounts}");
}

/// The process that has this argument.
fn find_process(argument: &str) -> Option<String> {
    std::fs::read_dir("/proc").ok()?.flatten().find_map(|entry| {
        let line = std::fs::read_to_string(entry.path().join("cmdline")).ok()?;
        let found = line.split('\0').nth(1) == Some(argument);
        found.then(|| entry.file_name().to_string_lossy().into_owned())
    })
}
