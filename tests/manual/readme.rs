//! The README's tour is run as it stands there, and shows what it says that it shows. Its blocks
//! of shell are those marked `sh tour`; what follows as `text` is what one of them prints, `...`
//! standing for whatever changes.

use super::every::units;
use super::generator::generate;
use super::{must_be_meant, read};
use harness::{flexnbd, free_port, project_path, require_tool, require_tools};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use std::fs::File;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

/// How long the tour may take; without a debugger in between it is two seconds.
const DEADLINE: Duration = Duration::from_secs(120);
/// The port in the README, for which the test takes a free one.
const PORT: &str = "10809";
/// Begins the output of each step.
const MARK: &str = "== next step ==";

/// A fenced block: what stands behind the fence, and what is in it.
fn blocks(markdown: &str) -> Vec<(String, String)> {
    let mut found: Vec<(String, String)> = Vec::new();
    let mut is_open = false;
    for line in markdown.lines() {
        match line.strip_prefix("```") {
            Some(_) if is_open => is_open = false,
            Some(kind) => {
                is_open = true;
                found.push((kind.to_owned(), String::new()));
            }
            None if is_open => {
                let (_, text) = found.last_mut().unwrap();
                text.push_str(line);
                text.push('\n');
            }
            None => {}
        }
    }
    assert!(!is_open, "a block is not closed");
    found
}

/// What to type, and what is then to be seen.
struct Step {
    shell: String,
    shown: String,
}

fn tour(port: u16) -> Vec<Step> {
    let mut steps: Vec<Step> = Vec::new();
    for (kind, text) in blocks(&read("README.md")) {
        let text = text.replace(PORT, &port.to_string());
        match kind.as_str() {
            "sh tour" => steps.push(Step { shell: text, shown: String::new() }),
            "text" => steps.last_mut().unwrap().shown.push_str(&text),
            _ => {}
        }
    }
    assert!(steps.len() > 5, "only {} steps found", steps.len());
    steps
}

/// Ends everything that was started, also when the test fails.
struct Group(Pid);

impl Drop for Group {
    fn drop(&mut self) {
        let _ = killpg(self.0, Signal::SIGKILL);
    }
}

/// Runs a script, and returns how it ended and all that it printed.
fn run(script: &str, directory: &Path) -> (Option<ExitStatus>, String) {
    let output = directory.join("output of the tour");
    let file = File::create(&output).unwrap();
    let program = flexnbd();
    let program = program.parent().unwrap();
    let path = std::env::var_os("PATH").unwrap_or_default();
    let path = [program.to_owned()].into_iter().chain(std::env::split_paths(&path));
    let work = directory.join("work");
    std::fs::create_dir(&work).unwrap();
    let mut command = Command::new("bash");
    command.args(["-euo", "pipefail", "-c", script]).current_dir(work);
    command.env("PATH", std::env::join_paths(path).unwrap()).env("LC_ALL", "C.UTF-8");
    command.stdin(Stdio::null()).stdout(file.try_clone().unwrap()).stderr(file).process_group(0);
    let child = command.spawn().unwrap();
    // A process id fits.
    let _group = Group(Pid::from_raw(child.id() as i32));
    let status = wait(child);
    (status, std::fs::read_to_string(output).unwrap())
}

fn wait(mut child: Child) -> Option<ExitStatus> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || sender.send(child.wait().unwrap()));
    receiver.recv_timeout(DEADLINE).ok()
}

/// Whether a line is as shown, any white space being as good as any other.
fn is_as_shown(line: &str, shown: &str) -> bool {
    let plain = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
    let (line, shown) = (plain(line), plain(shown));
    let mut parts = shown.split("...");
    let Some(mut rest) = line.strip_prefix(parts.next().unwrap_or_default()) else { return false };
    let mut parts = parts.peekable();
    if parts.peek().is_none() {
        return rest.is_empty();
    }
    while let Some(part) = parts.next() {
        if parts.peek().is_none() {
            return rest.ends_with(part);
        }
        let Some(at) = rest.find(part) else { return false };
        rest = &rest[at + part.len()..];
    }
    true
}

#[test]
fn dots_stand_for_whatever_changes_and_for_nothing_else() {
    for (line, shown) in
        [("a", "a"), ("a  b", "a\tb"), ("pid=12 size=3", "pid=... size=3"), ("xyz", "...")]
    {
        assert!(is_as_shown(line, shown), "{line} as {shown}");
    }
    for (line, shown) in
        [("ab", "a"), ("ba", "a"), ("pid=12 size=3", "pid=... size=4"), ("abc", "a...d")]
    {
        assert!(!is_as_shown(line, shown), "{line} as {shown}");
    }
}

#[test]
fn the_tour_shows_what_it_says() {
    if !require_tools(&["bash", "nbdinfo", "nbdcopy", "qemu-img"]) {
        return;
    }
    let steps = tour(free_port());
    let script: String =
        steps.iter().map(|step| format!("echo '{MARK}'\n{}", step.shell)).collect();
    let directory = tempfile::tempdir().unwrap();
    let (status, output) = run(&script, directory.path());
    let said = "this is what the tour printed";
    let status = status.unwrap_or_else(|| panic!("not done in {DEADLINE:?}; {said}:\n{output}"));
    assert!(status.success(), "the tour ended with {status}; {said}:\n{output}");
    for (step, printed) in steps.iter().zip(output.split(MARK).skip(1)) {
        let mut lines = printed.lines();
        for shown in step.shown.lines().filter(|line| *line != "...") {
            let found = lines.any(|line| is_as_shown(line, shown));
            assert!(found, "`{shown}` is not printed by\n{}\n{said}:\n{output}", step.shell);
        }
    }
}

#[test]
fn the_command_that_serves_a_disk_can_be_meant() {
    let readme = read("README.md");
    let line = readme.lines().find_map(|line| line.strip_prefix("cargo run --release -- serve"));
    must_be_meant(&format!("flexnbd serve{}", line.unwrap()));
}

/// The section about services, as far as the next one.
fn as_a_service() -> String {
    let readme = read("README.md");
    let section = readme.split("\n## As a service\n").nth(1).unwrap();
    section.split("\n## ").next().unwrap().to_owned()
}

/// The configuration in that section.
fn four_lines() -> String {
    let mut found = blocks(&as_a_service());
    found.retain(|(kind, _)| kind == "conf");
    assert_eq!(found.len(), 1, "{found:?}");
    found.remove(0).1
}

#[test]
fn four_lines_make_a_service() {
    let text = four_lines();
    assert_eq!(text.lines().count(), 4, "{text}");
    let generated = generate(&text);
    assert_eq!(generated.told, "");
    assert!(generated.settings().contains(&"ListenStream=[::]:10809"), "{generated:?}");
    let manual = read("man/flexnbd.service.7");
    assert!(manual.contains(&text), "the manual has other lines");
}

#[test]
fn the_four_lines_are_served_without_a_service_manager_too() {
    if !require_tool("bash") {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let text = four_lines().replace("/var/lib/flexnbd", directory.path().to_str().unwrap());
    let port = free_port().to_string();
    let text = text.replace(PORT, &port) + "SOCK=control\n";
    std::fs::write(directory.path().join("disk.conf"), text).unwrap();
    let script = format!(
        "flexnbd serve --config ../disk.conf &
        server=$!
        until [ -S control ]; do sleep 0.1; done
        flexnbd status --config ../disk.conf
        flexnbd read --addr ::1 --port {port} --from 10G --size 1 || echo end of the disk
        kill $server
        wait $server && echo ended well"
    );
    let (status, output) = run(&script, directory.path());
    assert!(status.is_some_and(|status| status.success()), "{output}");
    for line in ["size=10737418240 ownership=none", "end of the disk", "ended well"] {
        assert!(output.contains(line), "no `{line}` in:\n{output}");
    }
}

#[test]
fn commands_about_the_service_can_be_meant_and_their_units_are_ours() {
    let section = as_a_service();
    let found = blocks(&section);
    let lines: Vec<&str> = found.iter().flat_map(|(_, text)| text.lines()).collect();
    let commands = lines.iter().filter_map(|line| line.split('#').next());
    let ours_to_check: Vec<&str> =
        commands.map(str::trim).filter(|line| line.starts_with("flexnbd ")).collect();
    assert!(ours_to_check.len() >= 2, "only {ours_to_check:?} found");
    ours_to_check.into_iter().for_each(must_be_meant);
    let mentioned = units(&section);
    assert!(mentioned.len() >= 3, "only {mentioned:?} found");
    for unit in mentioned {
        assert!(project_path("systemd").join(&unit).is_file(), "{unit} is not ours");
    }
}

#[test]
fn files_that_the_readme_points_to_exist() {
    let readme = read("README.md");
    let targets = readme.split("](").skip(1).filter_map(|rest| rest.split(')').next());
    let is_file = |target: &&str| !target.contains("://") && !target.starts_with('#');
    let files: Vec<&str> = targets.filter(is_file).collect();
    assert!(files.len() >= 3, "only {files:?} found");
    for file in files {
        assert!(project_path(file).exists(), "{file} does not exist");
    }
}

#[test]
fn the_rust_that_is_needed_is_told() {
    let needed = format!("Rust {} or later", env!("CARGO_PKG_RUST_VERSION"));
    assert!(read("README.md").contains(&needed), "the README does not say `{needed}`");
}

#[test]
fn no_command_has_a_comment_behind_it() {
    // An interactive zsh takes the comment for arguments.
    let readme = read("README.md");
    let mut is_shell = false;
    for line in readme.lines() {
        if let Some(kind) = line.strip_prefix("```") {
            is_shell = kind.starts_with("sh");
        } else if is_shell {
            assert!(
                !line.starts_with('#') && !line.contains(" #") || line.starts_with("# Keys"),
                "{line}"
            );
        }
    }
}
