//! The picture in README.md: the ratio of each cell as a bar that begins at 1, in SVG.

use super::cells::{Cell, Generator, Transport, Work, word};
use super::results::{About, Ratio, Results};
use crate::report::Error;
use std::fs;
use std::path::Path;

/// Height above the bars, and of one line, in pixels, as all lengths here.
const TOP: f64 = 116.0;
const LINE: f64 = 19.0;
/// Left end and width of the scale.
const SCALE_X: (f64, f64) = (312.0, 476.0);
/// The smallest range of the scale.
const SCALE: (f64, f64) = (0.5, 4.0);
/// How far the scale extends beyond the longest bar, for the number beside that bar.
const ROOM: f64 = 1.15;
/// The title, the meaning of the colours, and the heads of the columns.
const LEGEND: &str = r##"<g fill="#59636E">
<text x="16" y="32.5" fill="#1F2328" font-size="19" font-weight="bold"
>Requests per second: flexnbd against the best other server</text>
<rect x="16" y="64" width="11" height="11" fill="#2B6CB0"/><text x="33" y="74">flexnbd faster</text>
<rect x="147" y="64" width="11" height="11" fill="#D96B1F"/><text x="164" y="74">slower</text>
<rect x="230" y="64" width="11" height="11" fill="#9FC2E6"/>
<rect x="245" y="64" width="11" height="11" fill="#F3BF96"/>
<text x="262" y="74">the client was the limit</text><text x="468" y="74">single rounds</text>
<path d="M438 70H460M438 67V73M460 67V73" stroke="#1F2328"/>
<g font-size="11"><text x="72" y="108" text-anchor="end">request</text>
<text x="212" y="108" text-anchor="end">depth</text>
<text x="282" y="108" text-anchor="end">sessions</text>
<text x="808" y="108">best other</text></g></g>
"##;
const INK: &str = "#1F2328";
const FAINT: &str = "#59636E";
/// The attribute of a text that ends at its position.
const END: &str = r#"text-anchor="end""#;

pub(crate) fn draw(results: &Results, file: &Path) -> Result<(), Error> {
    let ratios = results.cells.iter().filter_map(|cell| Some((cell.cell, cell.ratio.as_ref()?)));
    let mut cells: Vec<(Cell, &Ratio)> = ratios.collect();
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
    let groups = cells.chunk_by(|(one, _), (other, _)| group(one) == group(other));
    let lines = 1 + results.summary.len() + groups.clone().count() + cells.len();
    let bottom = TOP + LINE * lines as f64;
    let mut picture = Picture { scale, svg: String::new(), line_end: TOP };
    picture.draw_frame(&results.about, bottom);
    picture.draw_heading("Geometric means");
    for mean in &results.summary {
        let y = picture.next_line();
        let text = format!("{}, {} cells", generator_name(mean.generator), mean.cells);
        picture.text(16.0, y, INK, "", &text);
        picture.draw_bar(mean.rate, (mean.rate, mean.rate), false, y);
    }
    for cells in groups {
        let (generator, temperature, transport) = group(&cells[0].0);
        let transport = if transport == Transport::Tcp { "TCP" } else { "unix socket" };
        let generator = generator_name(generator);
        picture.draw_heading(&format!("{generator} · {transport} · {}", word(temperature)));
        cells.iter().for_each(|(cell, ratio)| picture.draw_cell(cell, ratio));
    }
    fs::write(file, picture.svg + "</svg>\n")
        .map_err(|error| format!("{}: {error}", file.display()).into())
}

fn generator_name(generator: Generator) -> &'static str {
    if generator == Generator::Raw { "Raw generator" } else { "fio (libnbd)" }
}

#[derive(Debug)]
struct Picture {
    /// The logarithms of both ends.
    scale: (i32, i32),
    svg: String,
    /// Lower end of the last line.
    line_end: f64,
}

impl Picture {
    /// Begins a line; returns the vertical position of its middle.
    fn next_line(&mut self) -> f64 {
        self.line_end += LINE;
        self.line_end - LINE / 2.0
    }

    fn x(&self, ratio: f64) -> f64 {
        let (low, high) = (f64::from(self.scale.0), f64::from(self.scale.1));
        SCALE_X.0 + (ratio.log2() - low) / (high - low) * SCALE_X.1
    }

    /// Draws everything except the lines.
    fn draw_frame(&mut self, about: &About, bottom: f64) {
        let height = bottom + 78.0;
        self.svg = format!(
            r##"<svg width="900" height="{height}" viewBox="0 0 900 {height}"
 xmlns="http://www.w3.org/2000/svg" font-family="sans-serif" font-size="12"
 shape-rendering="crispEdges">
<rect width="900" height="{height}" fill="#FFFFFF" stroke="#D0D7DE"/>
{LEGEND}"##
        );
        for power in self.scale.0..=self.scale.1 {
            let x = self.x(f64::from(power).exp2());
            let (line, ink, weight) =
                if power == 0 { (INK, INK, "bold") } else { ("#E2E6EB", FAINT, "normal") };
            self.path(&format!("M{x:.1} {}V{}", TOP - 4.0, bottom + 4.0), line);
            let factor = 1_u32 << power.unsigned_abs();
            let tick = if power < 0 { format!("× 1/{factor}") } else { format!("× {factor}") };
            let style = format!(r#"font-size="11" font-weight="{weight}" text-anchor="middle""#);
            self.text(x, TOP - 12.0, ink, &style, &tick);
            self.text(x, bottom + 12.0, ink, &style, &tick);
        }
        let About { machine, rounds, seconds, .. } = about;
        let environment = format!(
            "{}, flexnbd {}, {}, {} CPUs, Linux {}. Medians of {rounds} rounds of {seconds} s.",
            machine.date, machine.commit, machine.processor, machine.cpus, machine.kernel
        );
        let is_number = |word: &&str| word.starts_with(|c: char| c.is_ascii_digit());
        let peers = about.servers.iter().filter(|server| !server.ours).map(|server| {
            let version = server.version.split_whitespace().find(is_number).unwrap_or_default();
            format!("{} {version}", server.name)
        });
        let peers = peers.collect::<Vec<_>>().join(", ");
        let peers = format!("The others: {peers}. The best of them is named at the right.");
        self.text(16.0, 48.0, FAINT, "", &peers);
        self.text(16.0, height - 35.0, FAINT, r#"font-size="11""#, &environment);
        let style = r#"font-size="11" font-family="monospace""#;
        self.text(16.0, height - 16.0, FAINT, style, &machine.command);
    }

    fn draw_heading(&mut self, text: &str) {
        let y = self.next_line();
        self.rectangle((1.0, 899.0), y, LINE, "rgba(33,87,141,0.06)");
        self.text(16.0, y, INK, r#"font-weight="bold""#, text);
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
        self.text(72.0, y, INK, END, &format!("{block} {unit}"));
        self.text(80.0, y, INK, "", &format!("{order}{work}"));
        self.text(212.0, y, INK, END, &cell.depth.to_string());
        self.text(282.0, y, INK, END, &cell.sessions.to_string());
        self.text(808.0, y, FAINT, "", &ratio.peer);
        let spread = (ratio.rate_lowest, ratio.rate_highest);
        self.draw_bar(ratio.rate, spread, ratio.limited_by_client, y);
        let (low, high, top, bottom) = (self.x(spread.0), self.x(spread.1), y - 3.0, y + 3.0);
        let ends = format!("M{low:.1} {top}V{bottom}M{high:.1} {top}V{bottom}");
        self.path(&format!("M{low:.1} {y}H{high:.1}{ends}"), INK);
    }

    fn draw_bar(&mut self, rate: f64, (low, high): (f64, f64), limited: bool, y: f64) {
        let color = match (rate >= 1.0, limited) {
            (true, false) => "#2B6CB0",
            (true, true) => "#9FC2E6",
            (false, false) => "#D96B1F",
            (false, true) => "#F3BF96",
        };
        self.rectangle((self.x(rate.min(1.0)), self.x(rate.max(1.0))), y, 13.0, color);
        let (x, attributes) = if rate >= 1.0 {
            (self.x(high.max(rate)) + 6.0, "")
        } else {
            (self.x(low.min(rate)) - 6.0, END)
        };
        self.text(x, y, INK, attributes, &format!("{rate:.2}"));
    }

    /// A line of text, vertically centred at `y`.
    fn text(&mut self, x: f64, y: f64, color: &str, attributes: &str, text: &str) {
        let text = text.replace('&', "&amp;").replace('<', "&lt;");
        let place = format!(r#"x="{x:.1}" y="{y:.1}" dy="0.35em""#);
        self.svg += &format!("<text {place} fill=\"{color}\" {attributes}>{text}</text>\n");
    }

    /// A rectangle, vertically centred at `y`.
    fn rectangle(&mut self, (left, right): (f64, f64), y: f64, height: f64, color: &str) {
        let (top, width) = (y - height / 2.0, right - left);
        let place = format!(r#"x="{left:.1}" y="{top:.1}" width="{width:.1}" height="{height}""#);
        self.svg += &format!("<rect {place} fill=\"{color}\"/>\n");
    }

    fn path(&mut self, path: &str, color: &str) {
        self.svg += &format!("<path d=\"{path}\" stroke=\"{color}\"/>\n");
    }
}
