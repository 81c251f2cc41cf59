//! Ports that nobody else takes: tests run in parallel, in several processes.

use std::fs::File;
use std::net::TcpListener;

/// Below the range from which the kernel takes ports for outgoing connections.
const PORTS: std::ops::Range<u16> = 20_300..32_000;

/// A port, reserved among all tests of this machine until it is dropped. An agent may stop and start on it again.
#[derive(Debug)]
pub struct Port {
    /// Its number.
    pub number: u16,
    /// The reservation; the kernel gives it up with the process.
    _lock: File,
}

impl Port {
    /// Reserves a port on which nobody listens.
    pub fn reserve() -> Port {
        let dir = std::env::temp_dir().join("litefs-test-ports");
        std::fs::create_dir_all(&dir).expect("the directory for temporary files is writable");
        // Processes begin at different places, so that they rarely meet.
        let span = u32::from(PORTS.end - PORTS.start);
        let begin = std::process::id().wrapping_mul(97) % span;
        for i in 0..span {
            let number = PORTS.start + ((begin + i) % span) as u16;
            let file =
                File::options().write(true).create(true).truncate(false).open(dir.join(number.to_string()));
            let Ok(file) = file else { continue };
            if file.try_lock().is_ok() && TcpListener::bind(("127.0.0.1", number)).is_ok() {
                return Port { number, _lock: file };
            }
        }
        panic!("no free port in {PORTS:?}");
    }
}
