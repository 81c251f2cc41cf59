//! Which libraries a program is loaded with: what the dynamic loader would find, without running anything.

use super::elf::Elf;
use std::collections::{HashSet, VecDeque};
use std::path::{Path, PathBuf};
use std::process::Command;

/// More libraries than any program has.
const LIBRARIES_MAX: usize = 1000;

/// Finds libraries by their names.
#[derive(Debug)]
pub struct Loader {
    /// `name (kind) => path`, from the loader's cache.
    cache: Vec<(String, PathBuf)>,
}

impl Loader {
    /// Reads the cache of this host's loader. Without one, only the usual directories are looked at.
    pub fn of_this_host() -> Loader {
        let output = ["/sbin/ldconfig", "/usr/sbin/ldconfig", "ldconfig"]
            .iter()
            .find_map(|ldconfig| Command::new(ldconfig).arg("-p").output().ok());
        let text = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
        let cache = text
            .unwrap_or_default()
            .lines()
            .filter_map(|line| {
                let (left, path) = line.trim().split_once(" => ")?;
                let (name, _) = left.split_once(" (")?;
                Some((name.to_owned(), path.into()))
            })
            .collect();
        Loader { cache }
    }

    /// The libraries that come with a program or library, each with its path, nearest first; and names that nothing
    /// was found for.
    pub fn closure(&self, path: &Path, elf: &Elf) -> (Vec<(PathBuf, Elf)>, Vec<String>) {
        let mut queue: VecDeque<(String, Vec<PathBuf>)> = wanted(path, elf).into();
        let (mut seen, mut found, mut missing) = (HashSet::new(), Vec::new(), Vec::new());
        while let Some((name, dirs)) = queue.pop_front() {
            if !seen.insert(name.clone()) || seen.len() > LIBRARIES_MAX {
                continue;
            }
            match self.find(&name, &dirs, elf) {
                Some((path, library)) => {
                    // What the program brings along also helps its libraries.
                    let inherited = wanted(&path, &library).into_iter().map(|(name, mut own)| {
                        own.extend(dirs.iter().cloned());
                        (name, own)
                    });
                    queue.extend(inherited);
                    found.push((path, library));
                }
                None => missing.push(name),
            }
        }
        (found, missing)
    }

    fn find(&self, name: &str, dirs: &[PathBuf], program: &Elf) -> Option<(PathBuf, Elf)> {
        let beside = dirs.iter().map(|dir| dir.join(name));
        let environment = std::env::var_os("LD_LIBRARY_PATH").unwrap_or_default();
        let environment: Vec<PathBuf> =
            std::env::split_paths(&environment).map(|dir| dir.join(name)).collect();
        let cached = self.cache.iter().filter(|(known, _)| known == name).map(|(_, path)| path.clone());
        let usual = ["/lib", "/usr/lib", "/lib64", "/usr/lib64"].map(|dir| Path::new(dir).join(name));
        beside.chain(environment).chain(cached).chain(usual).find_map(|path| {
            let elf = Elf::read(&path).ok()??;
            (elf.is_64 == program.is_64 && elf.machine == program.machine).then_some((path, elf))
        })
    }
}

/// Names that a file asks for, with the directories that it names for them.
fn wanted(path: &Path, elf: &Elf) -> Vec<(String, Vec<PathBuf>)> {
    let real = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    let origin = real.parent().unwrap_or(Path::new("/")).to_string_lossy().into_owned();
    let dirs: Vec<PathBuf> = elf
        .library_path
        .iter()
        .map(|dir| dir.replace("${ORIGIN}", &origin).replace("$ORIGIN", &origin).into())
        .collect();
    elf.needed.iter().map(|name| (name.clone(), dirs.clone())).collect()
}
