//! Messages and shared-memory layout between the agent and the preload shim (`no_std`); filled by the preload door.
#![no_std]
