//! The agent as a service of systemd. All of it does nothing where systemd did not start the agent.
//!
//! | module          | what it does                                                                        |
//! |-----------------|-------------------------------------------------------------------------------------|
//! | [`fds`]         | descriptors that systemd passes and keeps over restarts                              |
//! | [`guard_scope`] | keeps the mount's guard out of what is killed together with the agent                |
//! | [`jobs`]        | whether the service is being restarted                                              |
//! | [`listeners`]   | the HTTP port and the control socket: from a socket unit, from the store, or our own |
//! | [`status`]      | the line that `systemctl status` shows                                               |
//! | [`watchdog`]    | tells systemd that the agent makes progress, as long as it does                      |
//! | [`targets`]     | units that run only on the primary, or only on a replica                             |
//! | [`journal`]     | messages                                                                            |
//! | [`credentials`] | secrets                                                                              |

pub mod credentials;
pub mod fds;
pub mod guard_scope;
pub mod jobs;
pub mod journal;
pub mod listeners;
pub mod status;
pub mod targets;
pub mod watchdog;
