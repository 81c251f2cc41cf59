//! `cargo xtask demo`: a primary and a replica at work. Two hosts with systemd from the packages, where this machine
//! can boot some; else two processes.

mod hosts;
mod interrupt;
mod processes;

use crate::setup;
use anyhow::Result;
use interrupt::Interrupt;

const CREATE: &str = "PRAGMA journal_mode=WAL; CREATE TABLE greeting(id INTEGER PRIMARY KEY, text TEXT);";
const INSERT: &str = "INSERT INTO greeting(text) VALUES ('hello from the primary'), ('seen on the replica');";
const SELECT: &str = "SELECT * FROM greeting;";

/// Shows the main job.
pub fn run() -> Result<()> {
    setup::packages()?;
    heading("boot two hosts with systemd");
    match hosts::boot() {
        Ok(fleet) => hosts::run(&fleet),
        Err(reason) => {
            println!("this machine boots none: {reason:#}\nso the agents are two processes here");
            processes::run()
        }
    }
}

fn heading(text: &str) {
    println!("\n== {text}");
}
