//! Shipping between nodes in memory, over real TCP on loopback.

mod frames;
mod history;
mod log;
mod memory_node;
mod peers;
mod silence;
mod site;
mod snapshot;
mod sockets;
