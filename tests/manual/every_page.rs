//! Checks for every page in man/: it formats without warnings and is installed; the pages, sections,
//! options, commands and units that it names exist.

use super::roff::Page;
use super::{assert_valid, read};
use harness::{project_path, require_tool, require_tools};
use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

/// A page and the name of its file.
struct Manual {
    file: String,
    source: String,
    page: Page,
}

fn manuals() -> Vec<Manual> {
    let entries = std::fs::read_dir(project_path("man")).unwrap();
    let mut files: Vec<String> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    files.sort_unstable();
    assert!(files.len() >= 4, "only {files:?} found");
    let manual = |file: String| {
        let source = read(&format!("man/{file}"));
        Manual { file, page: Page::parse(&source), source }
    };
    files.into_iter().map(manual).collect()
}

impl Manual {
    /// The name in references of other pages, as in `flexnbd 1`.
    fn name(&self) -> String {
        let (name, section) = self.file.rsplit_once('.').unwrap();
        format!("{name} {section}")
    }

    /// The example commands, without the prompt (`$`, `#`, or with the name of a host before it).
    fn commands(&self) -> Vec<String> {
        let prompted = |line: &String| {
            let (prompt, command) = line.split_once(' ')?;
            let host = prompt.strip_suffix(['$', '#'])?;
            host.chars().all(|c| c.is_ascii_lowercase()).then(|| command.trim().to_owned())
        };
        self.page.literal().iter().filter_map(prompted).collect()
    }
}

#[test]
fn pages_format_without_warnings() {
    for Manual { file, .. } in manuals() {
        let warnings = |program: &str, arguments: &[&str]| {
            let mut command = Command::new(program);
            command.args(arguments).arg(project_path("man").join(&file));
            let output = command.env("LC_ALL", "C.UTF-8").env("MANWIDTH", "80").output();
            let output = output.unwrap_or_else(|error| panic!("{program}: {error}"));
            assert!(output.status.success(), "{program} exited with {}", output.status);
            assert!(output.stdout.len() > 4_000, "{program} printed almost nothing of {file}");
            String::from_utf8_lossy(&output.stderr).into_owned()
        };
        if require_tool("man") {
            assert_eq!(warnings("man", &["--warnings", "-l"]), "", "{file}");
        }
        if require_tool("groff") {
            assert_eq!(warnings("groff", &["-man", "-Tutf8", "-ww"]), "", "{file}");
        }
    }
}

#[test]
fn pages_fit_80_columns() {
    if !require_tools(&["man", "col"]) {
        return;
    }
    for Manual { file, .. } in manuals() {
        let script = "MANWIDTH=80 man -l \"$0\" | col -bx";
        let mut man = Command::new("sh");
        man.args(["-c", script]).arg(project_path("man").join(&file)).env("LC_ALL", "C.UTF-8");
        let output = man.output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(text.lines().count() > 100, "{file}: {text}");
        let wide: Vec<&str> = text.lines().filter(|line| line.chars().count() > 80).collect();
        assert!(wide.is_empty(), "{file}: {wide:#?}");
    }
}

#[test]
fn page_titles_match_their_packaged_files() {
    let package = read("Cargo.toml");
    for manual in manuals() {
        let title = format!("\n.Dt {}\n", manual.name().to_uppercase()).replace('-', "\\-");
        let plain = title.replace("\\-", "-");
        let has_title = manual.source.contains(&title) || manual.source.contains(&plain);
        assert!(has_title, "{} has no line {plain}", manual.file);
        let (_, section) = manual.file.rsplit_once('.').unwrap();
        let asset = format!("[\"man/{}\", \"usr/share/man/man{section}/\", \"644\"]", manual.file);
        assert!(package.lines().any(|line| line.trim_start().starts_with(&asset)), "no {asset}");
    }
}

#[test]
fn pages_refer_to_exactly_the_other_pages() {
    let all = manuals();
    let names: BTreeSet<String> = all.iter().map(Manual::name).collect();
    for manual in &all {
        let seen: BTreeSet<&str> = manual
            .page
            .at("SEE ALSO")
            .filter_map(|line| line.strip_prefix(".Xr "))
            .map(|line| line.trim_end_matches(" ,"))
            .collect();
        let expected = names.iter().map(String::as_str).filter(|name| *name != manual.name());
        let missing: Vec<&str> = expected.filter(|name| !seen.contains(name)).collect();
        assert!(missing.is_empty(), "{} does not refer to {missing:?}", manual.file);
        let source = manual.source.replace(r"\-", "-");
        for reference in source.split("Xr ").skip(1) {
            let mut words = reference.split_whitespace();
            let (Some(name), Some(section)) = (words.next(), words.next()) else { continue };
            let name = format!("{name} {section}");
            let is_ours = name.starts_with("flexnbd");
            assert!(!is_ours || names.contains(&name), "{} refers to {name}", manual.file);
        }
    }
}

#[test]
fn referenced_sections_exist() {
    for Manual { file, source, .. } in manuals() {
        let source = source.replace(r"\-", "-");
        let headings: Vec<&str> = source
            .lines()
            .filter_map(|line| line.strip_prefix(".Sh ").or(line.strip_prefix(".Ss ")))
            .collect();
        let mentioned = source.lines().filter_map(|line| line.strip_prefix(".Sx "));
        let mentioned: Vec<&str> =
            mentioned.map(|name| name.trim_end_matches([' ', '.', ';', ',', ')'])).collect();
        assert!(!mentioned.is_empty(), "{file}: none found");
        for name in mentioned {
            assert!(headings.contains(&name), "{file} has no section `{name}`");
        }
    }
}

#[test]
fn mentioned_options_exist() {
    let mut program = flexnbd::cli::command();
    program.build();
    let modes = program.get_subcommands().flat_map(clap::Command::get_arguments);
    let arguments: Vec<&clap::Arg> = program.get_arguments().chain(modes).collect();
    let long = arguments.iter().filter_map(|arg| arg.get_long()).map(|long| format!("--{long}"));
    let short = arguments.iter().filter_map(|arg| arg.get_short()).map(|c| format!("-{c}"));
    let known: BTreeSet<String> = long.chain(short).collect();
    for Manual { file, page, .. } in manuals() {
        let mentioned = page.options();
        assert!(mentioned.len() >= 3, "{file}: only {mentioned:?} found");
        let unknown: Vec<_> = mentioned.difference(&known).collect();
        assert!(unknown.is_empty(), "{file} mentions {unknown:?}");
    }
}

#[test]
fn commands_in_examples_are_valid() {
    let mut count = 0;
    for manual in manuals() {
        for command in manual.commands() {
            for part in command.split(['|', '&']).map(str::trim) {
                if part.starts_with("flexnbd ") || part.starts_with("flexnbd-proxy ") {
                    assert_valid(part);
                    count += 1;
                }
            }
        }
    }
    assert!(count >= 20, "only {count} commands found");
}

/// The units in a text as templates: `flexnbd@disk.service` becomes `flexnbd@.service`.
pub(crate) fn units(text: &str) -> BTreeSet<String> {
    let is_part = |c: char| c.is_ascii_alphanumeric() || "-@.".contains(c);
    let words = text.split(|c: char| !is_part(c)).map(|word| word.trim_end_matches('.'));
    let units = words.filter(|word| word.starts_with("flexnbd") && word.contains('@'));
    units
        .filter_map(|unit| {
            // Also accepts the directory of drop-ins.
            let (template, rest) = unit.trim_end_matches(".d").split_once('@')?;
            let (_, kind) = rest.rsplit_once('.')?;
            Some(format!("{template}@.{kind}"))
        })
        .collect()
}

#[test]
fn mentioned_units_exist() {
    for Manual { file, source, .. } in manuals() {
        for unit in units(&source.replace(r"\-", "-")) {
            let known = project_path("systemd").join(&unit);
            assert!(Path::new(&known).is_file(), "{file} mentions {unit}");
        }
    }
}
