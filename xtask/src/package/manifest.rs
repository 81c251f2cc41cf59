//! What is in the packages: one list for .deb and .rpm.

use super::Format;

/// One package.
pub struct Package {
    /// Its name.
    pub name: &'static str,
    /// One line.
    pub summary: &'static str,
    /// Paragraphs of words, each one line here.
    pub description: &'static [&'static str],
    /// Debian's section, and its name as an RPM group has none.
    pub section: &'static str,
    /// Of what it is built; the first one decides what the package depends on.
    pub binaries: &'static [Binary],
    /// Files, in no order.
    pub files: &'static [Entry],
    /// Empty directories: path and mode.
    pub dirs: &'static [(&'static str, u32)],
    /// Other packages: Debian's field, its value, RPM's tag and value.
    pub relations: &'static [Relation],
    /// Whether the maintainer scripts of `packaging/scripts` are for this package.
    pub scripts: bool,
    /// Whether several architectures of it can be installed at once.
    pub multi_arch: bool,
}

/// What cargo builds for a package, and where it goes.
pub struct Binary {
    /// Package of the workspace.
    pub cargo_package: &'static str,
    /// Cargo profile for packages that are given away.
    pub profile: &'static str,
    /// File in the directory of the profile.
    pub file: &'static str,
    /// Path where it is installed; see [`Entry::to`].
    pub to: &'static str,
}

/// A file of the repository.
pub struct Entry {
    /// Path in the repository; `DIR/*` are all files of a directory.
    pub from: &'static str,
    /// Path where it is installed; a directory with `/` at its end keeps the name. `{lib}` and `{zsh}` are where this
    /// kind of system has its libraries and completions.
    pub to: &'static str,
}

/// A relation to another package.
pub struct Relation {
    /// Field of Debian's control file.
    pub deb: (&'static str, &'static str),
    /// Tag of RPM's spec file; `None` where RPM finds out by itself.
    pub rpm: Option<(&'static str, &'static str)>,
}

const fn entry(from: &'static str, to: &'static str) -> Entry {
    Entry { from, to }
}

/// All packages.
pub const PACKAGES: &[Package] = &[
    Package {
        name: "litefs",
        summary: "keeps SQLite databases identical on every host of a fleet",
        description: &[
            "One agent per host shows a directory of ordinary SQLite databases to applications, which are neither \
             changed nor linked. One host is the primary and takes writes; all others are replicas: live and readable, \
             a moment behind.",
            "systemctl enable --now litefs@db starts the agent of a cluster named db.",
        ],
        section: "database",
        binaries: &[
            Binary {
                cargo_package: "litefs-agent",
                profile: "release",
                file: "litefs",
                to: "usr/bin/litefs",
            },
            Binary {
                cargo_package: "fuse-session",
                profile: "release",
                file: "litefs-mount",
                to: "usr/libexec/litefs/litefs-mount",
            },
        ],
        files: &[
            entry("systemd/litefs@.service", "usr/lib/systemd/system/"),
            entry("systemd/litefs-release-lease@.service", "usr/lib/systemd/system/"),
            entry("systemd/litefs-mount.service", "usr/lib/systemd/system/"),
            entry("systemd/litefs-mount.socket", "usr/lib/systemd/system/"),
            entry("systemd/litefs@.socket", "usr/lib/systemd/system/"),
            entry("systemd/litefs-control@.socket", "usr/lib/systemd/system/"),
            entry("systemd/litefs-primary@.target", "usr/lib/systemd/system/"),
            entry("systemd/litefs-replica@.target", "usr/lib/systemd/system/"),
            entry("systemd/litefs.sysusers", "usr/lib/sysusers.d/litefs.conf"),
            entry("systemd/litefs.tmpfiles", "usr/lib/tmpfiles.d/litefs.conf"),
            entry("systemd/litefs@.service.8", "usr/share/man/man8/"),
            entry("packaging/man/*", "usr/share/man/man{section}/"),
            entry("packaging/dbus/io.litefs.LiteFS1.conf", "usr/share/dbus-1/system.d/"),
            entry("packaging/dbus/interfaces/*", "usr/share/dbus-1/interfaces/"),
            entry("packaging/polkit/io.litefs.LiteFS1.policy", "usr/share/polkit-1/actions/"),
            entry("packaging/catalog/litefs.catalog", "usr/lib/systemd/catalog/"),
            entry("packaging/completions/litefs", "usr/share/bash-completion/completions/"),
            entry("packaging/completions/_litefs", "{zsh}/"),
            entry("packaging/completions/litefs.fish", "usr/share/fish/vendor_completions.d/"),
        ],
        dirs: &[("etc/litefs", 0o755), ("etc/litefs/credentials", 0o700)],
        relations: &[
            Relation {
                deb: (
                    "Depends",
                    "systemd | systemd-standalone-sysusers, systemd | systemd-standalone-tmpfiles",
                ),
                rpm: Some(("Requires", "systemd")),
            },
            Relation { deb: ("Suggests", "liblitefs, sqlite3"), rpm: Some(("Suggests", "liblitefs")) },
        ],
        scripts: true,
        multi_arch: false,
    },
    Package {
        name: "liblitefs",
        summary: "replicates an application's SQLite databases without FUSE",
        description: &[
            "LD_PRELOAD=liblitefs.so has an application meet the LiteFS agent of its host at each commit of a managed \
             database, on hosts where the agent cannot mount.",
        ],
        section: "libs",
        binaries: &[Binary {
            cargo_package: "preload-shim",
            profile: "shim",
            file: "liblitefs.so",
            to: "{lib}/liblitefs.so",
        }],
        files: &[],
        dirs: &[],
        relations: &[Relation { deb: ("Suggests", "litefs"), rpm: Some(("Suggests", "litefs")) }],
        scripts: false,
        multi_arch: true,
    },
];

/// Where a path of the manifest is on this kind of system.
pub fn place(to: &str, format: Format) -> String {
    let (lib, zsh) = match format {
        Format::Deb => {
            (format!("usr/lib/{}-linux-gnu", std::env::consts::ARCH), "usr/share/zsh/vendor-completions")
        }
        Format::Rpm => ("usr/lib64".to_owned(), "usr/share/zsh/site-functions"),
    };
    to.replace("{lib}", &lib).replace("{zsh}", zsh)
}

/// Words in lines of less than 80 columns.
pub fn wrapped(paragraph: &str) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in paragraph.split_whitespace() {
        let last = lines.len() - 1;
        if !lines[last].is_empty() && lines[last].len() + 1 + word.len() > 78 {
            lines.push(String::new());
        }
        let last = lines.len() - 1;
        if !lines[last].is_empty() {
            lines[last].push(' ');
        }
        lines[last].push_str(word);
    }
    lines
}
