//! `litefs reload`.

use super::client::{self, Client};
use super::failure::Failure;

pub async fn reload(client: Client) -> Result<u8, Failure> {
    // Its end is the answer: a reload may wait for a follower to stop.
    client.send(client::request("POST", "/v1/reload".to_owned(), client::empty())?).await?;
    Ok(0)
}
