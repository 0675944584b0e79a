//! The picture in README.md: the ratio of each cell as a bar that begins at 1, in SVG.

use super::Error;
use super::cells::{Cell, Generator, Transport, Work, word};
use super::results::{About, Ratio, Results};
use super::summary;
use std::fmt::Write;
use std::fs;
use std::path::Path;

/// In pixels, as all lengths here.
const WIDTH: f64 = 900.0;
/// Height above the bars, of one line, and below the bars.
const TOP: f64 = 116.0;
const LINE: f64 = 19.0;
const BOTTOM: f64 = 78.0;
/// Left and right end of the scale.
const SCALE_X: (f64, f64) = (312.0, 788.0);
/// Positions of the columns.
const MARGIN: f64 = 16.0;
const BLOCK_END: f64 = 72.0;
const WORK_BEGIN: f64 = 80.0;
const DEPTH_END: f64 = 212.0;
const SESSIONS_END: f64 = 282.0;
const PEER_BEGIN: f64 = 808.0;
/// The smallest range of the scale.
const SCALE: (f64, f64) = (0.5, 4.0);
/// How far the scale extends beyond the longest bar, for the number beside that bar.
const ROOM: f64 = 1.15;

const BAND: &str = "#F1F4F7";
const GRID: &str = "#E2E6EB";
const INK: &str = "#1F2328";
const FAINT: &str = "#59636E";
const FASTER: &str = "#2B6CB0";
const SLOWER: &str = "#D96B1F";
const FASTER_LIMITED: &str = "#9FC2E6";
const SLOWER_LIMITED: &str = "#F3BF96";

/// The title, the meaning of the colours, and the heads of the columns.
const LEGEND: &str = r##"<g fill="#59636E">
<text x="16" y="32.5" fill="#1F2328" font-size="19" font-weight="bold">Requests per second: flexnbd against the best other server</text>
<rect x="16" y="64" width="11" height="11" fill="#2B6CB0"/><text x="33" y="74">flexnbd faster</text>
<rect x="147" y="64" width="11" height="11" fill="#D96B1F"/><text x="164" y="74">slower</text>
<rect x="230" y="64" width="11" height="11" fill="#9FC2E6"/>
<rect x="245" y="64" width="11" height="11" fill="#F3BF96"/>
<text x="262" y="74">the client was the limit</text><text x="468" y="74">single rounds</text>
<g font-size="11"><text x="72" y="108" text-anchor="end">request</text>
<text x="212" y="108" text-anchor="end">depth</text><text x="282" y="108" text-anchor="end">sessions</text>
<text x="808" y="108">best other</text></g></g>
"##;
/// Additional attributes of a text.
const RIGHT: &str = r#"text-anchor="end""#;
const BOLD: &str = r#"font-weight="bold""#;
const SMALL: &str = r#"font-size="11""#;

/// Draws the picture into a file.
pub(super) fn draw(results: &Results, file: &Path) -> Result<(), Error> {
    let mut cells: Vec<(Cell, Ratio)> =
        results.cells.iter().filter_map(|cell| Some((cell.cell, cell.ratio()?))).collect();
    if cells.is_empty() {
        return Err("there is no ratio to draw".into());
    }
    let group = |cell: &Cell| (cell.generator, cell.temperature, cell.transport);
    cells.sort_by_key(|(cell, _)| group(cell));
    // The powers of two that enclose all bars and spreads.
    let (low, high) = cells.iter().fold(SCALE, |(low, high), (_, ratio)| {
        (low.min(ratio.rate_lowest / ROOM), high.max(ratio.rate_highest * ROOM))
    });
    let scale = (low.log2().floor() as i32, high.log2().ceil() as i32);
    let mut picture = Picture { scale, bottom: TOP, ..Picture::default() };
    picture.draw_top(&results.about);
    picture.draw_heading("Geometric means");
    for mean in summary::means(&results.cells) {
        let text = format!("{}, {} cells", generator_name(mean.generator), mean.cells);
        let y = picture.next_line();
        picture.text(&text, (MARGIN, y), INK, "");
        picture.draw_bar(mean.rate, (mean.rate, mean.rate), false, y);
    }
    for cells in cells.chunk_by(|(one, _), (other, _)| group(one) == group(other)) {
        let (generator, temperature, transport) = group(&cells[0].0);
        let transport = match transport {
            Transport::Tcp => "TCP",
            Transport::Unix => "unix socket",
        };
        let generator = generator_name(generator);
        picture.draw_heading(&format!("{generator} · {transport} · {}", word(temperature)));
        cells.iter().for_each(|(cell, ratio)| picture.draw_cell(cell, ratio));
    }
    let svg = picture.finish(&results.about);
    fs::write(file, svg).map_err(|error| format!("{}: {error}", file.display()).into())
}

fn generator_name(generator: Generator) -> &'static str {
    match generator {
        Generator::Raw => "Raw generator",
        Generator::Fio => "fio (libnbd)",
    }
}

#[derive(Debug, Default)]
struct Picture {
    /// The bands of the headings, behind the grid.
    bands: String,
    /// Everything in front of the grid.
    front: String,
    /// The logarithms of both ends.
    scale: (i32, i32),
    /// Lower end of the last line.
    bottom: f64,
}

impl Picture {
    /// Begins a line; returns the vertical position of its middle.
    fn next_line(&mut self) -> f64 {
        self.bottom += LINE;
        self.bottom - LINE / 2.0
    }

    fn finish(mut self, about: &About) -> String {
        let (bottom, height) = (self.bottom, self.bottom + BOTTOM);
        let About { machine, rounds, seconds, .. } = about;
        let text = format!(
            "{}, flexnbd {}, {}, {} CPUs, Linux {}. Medians of {rounds} rounds of {seconds} s.",
            machine.date, machine.commit, machine.processor, machine.cpus, machine.kernel
        );
        self.text(&text, (MARGIN, height - 35.0), FAINT, SMALL);
        let monospace = r#"font-size="11" font-family="monospace""#;
        self.text(&machine.command, (MARGIN, height - 16.0), FAINT, monospace);
        let front = std::mem::take(&mut self.front);
        for power in self.scale.0..=self.scale.1 {
            let x = self.x(f64::from(power).exp2());
            let (line, ink, weight) = if power == 0 { (INK, INK, BOLD) } else { (GRID, FAINT, "") };
            self.line((x, x), (TOP - 4.0, bottom + 4.0), line);
            let factor = 1_u32 << power.unsigned_abs();
            let tick = if power < 0 { format!("× 1/{factor}") } else { format!("× {factor}") };
            let attributes = format!(r#"{SMALL} {weight} text-anchor="middle""#);
            self.text(&tick, (x, TOP - 12.0), ink, &attributes);
            self.text(&tick, (x, bottom + 12.0), ink, &attributes);
        }
        format!(
            r##"<svg width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}"
 xmlns="http://www.w3.org/2000/svg" font-family="sans-serif" font-size="12"
 shape-rendering="crispEdges">
<rect width="{WIDTH}" height="{height}" fill="#FFFFFF" stroke="#D0D7DE"/>
{}{}{front}</svg>
"##,
            self.bands, self.front
        )
    }

    fn draw_top(&mut self, about: &About) {
        self.front.push_str(LEGEND);
        let is_number = |word: &&str| word.starts_with(|c: char| c.is_ascii_digit());
        let peers = about.servers.iter().filter(|server| !server.ours).map(|server| {
            let version = server.version.split_whitespace().find(is_number).unwrap_or_default();
            format!("{} {version}", server.name)
        });
        let peers = peers.collect::<Vec<_>>().join(", ");
        let text = format!("The others: {peers}. The best of them is named at the right.");
        self.text(&text, (MARGIN, 48.0), FAINT, "");
        self.spread((438.0, 460.0), 70.0);
    }

    fn draw_heading(&mut self, text: &str) {
        let y = self.next_line();
        let band = rectangle((1.0, WIDTH - 1.0), (y - LINE / 2.0, y + LINE / 2.0), BAND);
        self.bands.push_str(&band);
        self.text(text, (MARGIN, y), INK, BOLD);
    }

    fn draw_cell(&mut self, cell: &Cell, ratio: &Ratio) {
        let y = self.next_line();
        let (block, unit) = cell.block_in_units();
        let order = if cell.is_sequential() { "" } else { "random " };
        let work = match cell.work {
            Work::Read => "reads",
            Work::Write => "writes",
            Work::Mixed => "mixed",
        };
        self.text(&format!("{block} {unit}"), (BLOCK_END, y), INK, RIGHT);
        self.text(&format!("{order}{work}"), (WORK_BEGIN, y), INK, "");
        self.text(&cell.depth.to_string(), (DEPTH_END, y), INK, RIGHT);
        self.text(&cell.sessions.to_string(), (SESSIONS_END, y), INK, RIGHT);
        self.text(&ratio.peer, (PEER_BEGIN, y), FAINT, "");
        let spread = (ratio.rate_lowest, ratio.rate_highest);
        self.draw_bar(ratio.rate, spread, ratio.limited_by_client, y);
        self.spread((self.x(spread.0), self.x(spread.1)), y);
    }

    fn draw_bar(&mut self, rate: f64, (low, high): (f64, f64), limited: bool, y: f64) {
        let ((left, right), color, limited_color) = if rate >= 1.0 {
            ((1.0, rate), FASTER, FASTER_LIMITED)
        } else {
            ((rate, 1.0), SLOWER, SLOWER_LIMITED)
        };
        let color = if limited { limited_color } else { color };
        self.front.push_str(&rectangle((self.x(left), self.x(right)), (y - 6.5, y + 6.5), color));
        let number = format!("{rate:.2}");
        if rate >= 1.0 {
            self.text(&number, (self.x(high.max(rate)) + 6.0, y), INK, "");
        } else {
            self.text(&number, (self.x(low.min(rate)) - 6.0, y), INK, RIGHT);
        }
    }

    fn x(&self, ratio: f64) -> f64 {
        let (low, high) = (f64::from(self.scale.0), f64::from(self.scale.1));
        SCALE_X.0 + (ratio.log2() - low) / (high - low) * (SCALE_X.1 - SCALE_X.0)
    }

    /// A horizontal line with strokes at its ends.
    fn spread(&mut self, (left, right): (f64, f64), y: f64) {
        self.line((left, right), (y, y), INK);
        self.line((left, left), (y - 3.0, y + 3.0), INK);
        self.line((right, right), (y - 3.0, y + 3.0), INK);
    }

    fn line(&mut self, x: (f64, f64), y: (f64, f64), color: &str) {
        let _ = writeln!(
            self.front,
            r#"<line x1="{:.1}" x2="{:.1}" y1="{:.1}" y2="{:.1}" stroke="{color}"/>"#,
            x.0, x.1, y.0, y.1
        );
    }

    /// A line of text, vertically centred at `y`.
    fn text(&mut self, text: &str, (x, y): (f64, f64), color: &str, attributes: &str) {
        let text = text.replace('&', "&amp;").replace('<', "&lt;");
        let _ = writeln!(
            self.front,
            r#"<text x="{x:.1}" y="{y:.1}" dy="0.35em" fill="{color}" {attributes}>{text}</text>"#
        );
    }
}

fn rectangle(x: (f64, f64), y: (f64, f64), color: &str) -> String {
    let (width, height) = (x.1 - x.0, y.1 - y.0);
    format!(
        "<rect x=\"{:.1}\" y=\"{:.1}\" width=\"{width:.1}\" height=\"{height:.1}\" fill=\"{color}\"/>\n",
        x.0, y.0
    )
}
