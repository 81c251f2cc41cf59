//! `litefs promote`, `demote`, `handoff` and `release-lease`.

use super::client::{self, Client};
use super::failure::{self, Failure};
use crate::config::{Config, LeaseKind, Source};
use crate::lease::consul::{ReleaseError, Released, release_of_dead_agent};
use std::io::Write;

/// Asks for another role; ends when this host has it.
pub async fn change(client: Client, path: &str, query: &[(&str, &str)]) -> Result<u8, Failure> {
    let query = form_urlencoded::Serializer::new(String::new()).extend_pairs(query).finish();
    client.send(client::request("POST", format!("{path}?{query}"), client::empty())?).await?;
    Ok(0)
}

/// Lets go of the lease of an agent that died. It needs no agent, but the configuration.
pub async fn release(source: &Source, out: &mut dyn Write) -> Result<u8, Failure> {
    let config = Config::load(source).map_err(|error| Failure::new(failure::CONFIG, error))?;
    if config.lease.kind == LeaseKind::Static {
        return Ok(0);
    }
    let released = release_of_dead_agent(config.consul.options(), &config.consul.key, &config.data.dir).await;
    let said = match released {
        Ok(Released::Lease) => "the lease is free",
        Ok(Released::Session) => "this host did not have the lease; its session has ended",
        Ok(Released::Nothing) => "this host has no session",
        Err(error @ ReleaseError::Alive(_)) => return Err(Failure::new(failure::DATA, error)),
        Err(error @ ReleaseError::Consul(_)) => return Err(Failure::new(failure::UNAVAILABLE, error)),
    };
    writeln!(out, "{said}").map_err(failure::stdout)?;
    Ok(0)
}
