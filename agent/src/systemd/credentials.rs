//! Secrets as systemd passes them: files in a directory that only this service can read (systemd.exec(5),
//! `LoadCredential=`). Each file `/etc/litefs/credentials/NAME` is one.

use std::io;
use std::path::{Path, PathBuf};

/// Tokens and keys are smaller.
const BYTES_MAX: u64 = 64 << 10;

/// What `LoadCredential=litefs:/etc/litefs/credentials` puts before the names of the files in that directory.
const PREFIX: &str = "litefs_";

/// Where systemd put the credentials of this service, if it did.
fn directory() -> Option<PathBuf> {
    std::env::var_os("CREDENTIALS_DIRECTORY").map(PathBuf::from)
}

/// Reads the secret of this name, without the line break at its end. `None`: there is none.
///
/// # Errors
/// It cannot be read, is no text, or too long; the error names the file.
pub fn read(name: &str) -> io::Result<Option<String>> {
    match directory() {
        Some(dir) => read_in(&dir, name),
        None => Ok(None),
    }
}

fn read_in(dir: &Path, name: &str) -> io::Result<Option<String>> {
    if name.is_empty() || name.contains('/') || name.starts_with('.') {
        let message = format!("{name:?} is no name of a credential");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
    }
    // With `ImportCredential=litefs.*` the name has a dot; by hand it may have no prefix.
    for file in [format!("{PREFIX}{name}"), format!("litefs.{name}"), name.to_owned()] {
        let path = dir.join(file);
        let named = |error: io::Error| {
            io::Error::new(error.kind(), format!("cannot read the credential {}: {error}", path.display()))
        };
        match std::fs::metadata(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Ok(metadata) if metadata.len() > BYTES_MAX => {
                return Err(named(io::Error::other("longer than 64 KiB")));
            }
            metadata => metadata.map_err(named)?,
        };
        let text = std::fs::read_to_string(&path).map_err(named)?;
        return Ok(Some(text.trim_end_matches(['\n', '\r']).to_owned()));
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_credential_is_found_under_each_of_its_names() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(read_in(dir.path(), "token").unwrap(), None);
        for file in ["token", "litefs.token", "litefs_token"] {
            std::fs::write(dir.path().join(file), format!("secret of {file}\n")).unwrap();
            assert_eq!(read_in(dir.path(), "token").unwrap(), Some(format!("secret of {file}")));
        }
    }

    #[test]
    fn a_name_cannot_leave_the_directory() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["../token", "", ".", "a/b"] {
            let error = read_in(&dir.path().join("credentials"), name).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{name}");
        }
    }

    #[test]
    fn what_is_no_secret_is_refused_with_its_path() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("token"), [0xff]).unwrap();
        let error = read_in(dir.path(), "token").unwrap_err().to_string();
        assert!(error.contains(&dir.path().join("token").display().to_string()), "{error}");
        std::fs::write(dir.path().join("token"), vec![b'a'; 1 << 17]).unwrap();
        assert!(read_in(dir.path(), "token").unwrap_err().to_string().contains("64 KiB"));
    }
}
