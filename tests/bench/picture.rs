//! The ratios of all cells as a picture for a README: a bar for each, from 1 outwards.
//! What is drawn is decided in `lines`; the rest is where and in which colour.

use super::Trouble;
use super::cells::CellReport;
use super::grid::{Cell, Source, Temperature, Transport, Work};
use super::report::{About, Report};
use super::summary::{self, Mean};
use plotters::coord::Shift;
use plotters::coord::types::RangedCoordf64;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use std::path::Path;

/// Width in pixels: that of a README's column.
const WIDTH: u32 = 900;
/// Height of what stands above the bars, of a line of them, and of what stands below.
const TOP: u32 = 116;
const LINE: u32 = 19;
const BOTTOM: u32 = 78;
/// Where the bars begin and end.
const BARS: (u32, u32) = (312, 788);
/// Where the columns before and behind them are.
const MARGIN: i32 = 16;
const BLOCK_END: i32 = 72;
const WORK_BEGIN: i32 = 80;
const DEPTH_END: i32 = 212;
const SESSIONS_END: i32 = 282;
const PEER_BEGIN: i32 = 808;
/// How far a bar is from the next one, and its label from it.
const GAP: i32 = 3;
const LABEL_GAP: i32 = 6;
/// Sizes of text in pixels.
const LARGE: u32 = 19;
const USUAL: u32 = 12;
const SMALL: u32 = 11;
/// Half the length of the strokes that end a spread.
const STROKE: i32 = 3;
/// The scale reaches at least from the first to the second.
const SCALE: (f64, f64) = (0.5, 4.0);
/// How much further than the furthest bar it reaches, for the sake of that one's number.
const ROOM: f64 = 1.15;
/// What this library takes for the size of a font of one pixel.
const PIXEL: f64 = 1.24;

const PAPER: RGBColor = RGBColor(0xff, 0xff, 0xff);
const EDGE: RGBColor = RGBColor(0xd0, 0xd7, 0xde);
const BAND: RGBColor = RGBColor(0xf1, 0xf4, 0xf7);
const GRID: RGBColor = RGBColor(0xe2, 0xe6, 0xeb);
const INK: RGBColor = RGBColor(0x1f, 0x23, 0x28);
const FAINT: RGBColor = RGBColor(0x59, 0x63, 0x6e);
const FASTER: RGBColor = RGBColor(0x2b, 0x6c, 0xb0);
const SLOWER: RGBColor = RGBColor(0xd9, 0x6b, 0x1f);
const FASTER_LIMITED: RGBColor = RGBColor(0x9f, 0xc2, 0xe6);
const SLOWER_LIMITED: RGBColor = RGBColor(0xf3, 0xbf, 0x96);

type Canvas<'a> = DrawingArea<SVGBackend<'a>, Shift>;
/// Maps ratios and lines to pixels.
type Chart<'a, 'b> = ChartContext<'a, SVGBackend<'b>, Cartesian2d<LogCoord<f64>, RangedCoordf64>>;

/// One line of the picture.
#[derive(Clone, Debug, PartialEq)]
enum Line {
    Heading(String),
    Bar(Bar),
}

/// A ratio, and what it is the ratio of.
#[derive(Clone, Debug, PartialEq)]
struct Bar {
    label: Label,
    rate: f64,
    spread: Option<(f64, f64)>,
    limited_by_client: bool,
    peer: String,
}

/// What stands before a bar.
#[derive(Clone, Debug, PartialEq)]
enum Label {
    Mean(String),
    Cell(Cell),
}

/// Draws the picture.
///
/// # Errors
/// When there is nothing to draw, or the file cannot be written.
pub(super) fn draw(report: &Report, file: &Path) -> Result<(), Trouble> {
    let lines = lines(&report.cells);
    if lines.is_empty() {
        return Err("nothing was compared that could be drawn".into());
    }
    let height = TOP + LINE * lines.len() as u32 + BOTTOM;
    let root = SVGBackend::new(file, (WIDTH, height)).into_drawing_area();
    draw_on(&root, &report.about, &lines, height)
        .and_then(|()| Ok(root.present()?))
        .map_err(|trouble| format!("{}: {trouble}", file.display()).into())
}

/// Pure: the means, then the cells in groups.
fn lines(cells: &[CellReport]) -> Vec<Line> {
    let means = summary::means(cells);
    if means.is_empty() {
        return Vec::new();
    }
    let mut lines = vec![Line::Heading("Geometric means".to_owned())];
    lines.extend(means.iter().map(|mean| Line::Bar(mean_bar(mean))));
    for source in [Source::Raw, Source::Fio] {
        for temperature in [Temperature::Cached, Temperature::Cold] {
            for transport in [Transport::Tcp, Transport::Unix] {
                let belongs = |cell: &Cell| {
                    (cell.source, cell.temperature, cell.transport)
                        == (source, temperature, transport)
                };
                let group = cells.iter().filter(|cell| belongs(&cell.cell));
                let bars: Vec<Line> = group.filter_map(cell_bar).map(Line::Bar).collect();
                if !bars.is_empty() {
                    lines.push(Line::Heading(heading(source, temperature, transport)));
                    lines.extend(bars);
                }
            }
        }
    }
    lines
}

fn heading(source: Source, temperature: Temperature, transport: Transport) -> String {
    let source = generator(source);
    let transport = match transport {
        Transport::Tcp => "TCP",
        Transport::Unix => "unix socket",
    };
    format!("{source} · {transport} · {}", temperature.word())
}

fn generator(source: Source) -> &'static str {
    match source {
        Source::Raw => "Raw generator",
        Source::Fio => "fio (libnbd)",
    }
}

fn mean_bar(mean: &Mean) -> Bar {
    Bar {
        label: Label::Mean(format!("{}, {} cells", generator(mean.generator), mean.cells)),
        rate: mean.rate,
        spread: None,
        limited_by_client: false,
        peer: String::new(),
    }
}

fn cell_bar(cell: &CellReport) -> Option<Bar> {
    let ratio = cell.ratio()?;
    Some(Bar {
        label: Label::Cell(cell.cell),
        rate: ratio.rate,
        spread: Some((ratio.rate_lowest, ratio.rate_highest)),
        limited_by_client: ratio.limited_by_client,
        peer: ratio.peer,
    })
}

/// Pure: the powers of two between which all bars and spreads lie.
fn scale(lines: &[Line]) -> (f64, f64) {
    let bars = lines.iter().filter_map(|line| match line {
        Line::Bar(bar) => Some(bar),
        Line::Heading(_) => None,
    });
    let (lowest, highest) = bars.fold(SCALE, |(lowest, highest), bar| {
        let (low, high) = bar.spread.unwrap_or((bar.rate, bar.rate));
        (lowest.min(low / ROOM), highest.max(high * ROOM))
    });
    (lowest.log2().floor().exp2(), highest.log2().ceil().exp2())
}

/// Pure: as in `× 1/2` and `× 2`.
fn times(tick: f64) -> String {
    if tick < 1.0 { format!("× 1/{}", tick.recip()) } else { format!("× {tick}") }
}

/// Pure: the powers of two from one to the other.
fn ticks((lowest, highest): (f64, f64)) -> Vec<f64> {
    (lowest.log2() as i32..=highest.log2() as i32).map(|power| f64::from(power).exp2()).collect()
}

fn draw_on(root: &Canvas<'_>, about: &About, lines: &[Line], height: u32) -> Result<(), Trouble> {
    let (right, bottom) = (WIDTH as i32 - 1, height as i32 - 1);
    root.fill(&PAPER)?;
    root.draw(&Rectangle::new([(0, 0), (right, bottom)], EDGE.stroke_width(1)))?;
    draw_top(root, about)?;
    let scale = scale(lines);
    let chart = ChartBuilder::on(root)
        .margin_top(TOP)
        .margin_bottom(BOTTOM)
        .margin_left(BARS.0)
        .margin_right(WIDTH - BARS.1)
        .build_cartesian_2d((scale.0..scale.1).log_scale().base(2.0), lines.len() as f64..0.0)?;
    for (at, line) in lines.iter().enumerate() {
        if let Line::Heading(text) = line {
            draw_heading(root, &chart, at, text)?;
        }
    }
    draw_grid(root, &chart, scale, lines.len())?;
    for (at, line) in lines.iter().enumerate() {
        if let Line::Bar(bar) = line {
            draw_bar(root, &chart, at, bar)?;
        }
    }
    draw_caption(root, about, bottom)
}

/// The title, what the colours mean, and the heads of the columns.
fn draw_top(root: &Canvas<'_>, about: &About) -> Result<(), Trouble> {
    let title = "Requests per second: flexnbd against the best other server";
    write(root, title, (MARGIN, 26), &Style { size: LARGE, bold: true, ..Style::default() })?;
    let peers: Vec<String> = about
        .servers
        .iter()
        .filter(|server| !server.ours)
        .map(|server| format!("{} {}", server.name, short(&server.version)))
        .collect();
    let peers =
        format!("The others: {}. The best of them is named at the right.", peers.join(", "));
    let faint = Style { color: FAINT, ..Style::default() };
    write(root, &peers, (MARGIN, 48), &faint)?;
    let mut x = MARGIN;
    for (colors, text, width) in [
        (&[FASTER][..], "flexnbd faster", 116),
        (&[SLOWER], "slower", 68),
        (&[FASTER_LIMITED, SLOWER_LIMITED], "the client was the limit", 178),
    ] {
        for color in colors {
            root.draw(&Rectangle::new([(x, 64), (x + 11, 75)], color.filled()))?;
            x += 15;
        }
        write(root, text, (x + 2, 70), &faint)?;
        x += width;
    }
    draw_spread(root, (x, x + 22), 70)?;
    write(root, "single rounds", (x + 30, 70), &faint)?;
    let y = TOP as i32 - 12;
    for (text, x, column) in [
        ("request", BLOCK_END, HPos::Right),
        ("depth", DEPTH_END, HPos::Right),
        ("sessions", SESSIONS_END, HPos::Right),
        ("best other", PEER_BEGIN, HPos::Left),
    ] {
        write(
            root,
            text,
            (x, y),
            &Style { column, color: FAINT, size: SMALL, ..Style::default() },
        )?;
    }
    Ok(())
}

/// Pure: the number in what a program says of its version.
fn short(version: &str) -> &str {
    let number = |word: &&str| word.starts_with(|c: char| c.is_ascii_digit());
    version.split_whitespace().find(number).unwrap_or_default()
}

fn draw_heading(
    root: &Canvas<'_>,
    chart: &Chart<'_, '_>,
    at: usize,
    text: &str,
) -> Result<(), Trouble> {
    let (_, top) = chart.backend_coord(&(1.0, at as f64));
    let band = [(1, top), (WIDTH as i32 - 2, top + LINE as i32)];
    root.draw(&Rectangle::new(band, BAND.filled()))?;
    let style = Style { bold: true, ..Style::default() };
    write(root, text, (MARGIN, top + LINE as i32 / 2), &style)
}

fn draw_grid(
    root: &Canvas<'_>,
    chart: &Chart<'_, '_>,
    scale: (f64, f64),
    lines: usize,
) -> Result<(), Trouble> {
    for tick in ticks(scale) {
        let (x, top) = chart.backend_coord(&(tick, 0.0));
        let (_, bottom) = chart.backend_coord(&(tick, lines as f64));
        let is_one = tick == 1.0;
        let style = if is_one { INK.stroke_width(1) } else { GRID.stroke_width(1) };
        root.draw(&PathElement::new([(x, top - 4), (x, bottom + 4)], style))?;
        for y in [top - 12, bottom + 12] {
            let style = Style {
                column: HPos::Center,
                color: if is_one { INK } else { FAINT },
                bold: is_one,
                size: SMALL,
                ..Style::default()
            };
            write(root, &times(tick), (x, y), &style)?;
        }
    }
    Ok(())
}

fn draw_bar(root: &Canvas<'_>, chart: &Chart<'_, '_>, at: usize, bar: &Bar) -> Result<(), Trouble> {
    let (one, top) = chart.backend_coord(&(1.0, at as f64));
    let x = |ratio: f64| chart.backend_coord(&(ratio, at as f64)).0;
    let middle = top + LINE as i32 / 2;
    let color = match (bar.rate >= 1.0, bar.limited_by_client) {
        (true, false) => FASTER,
        (true, true) => FASTER_LIMITED,
        (false, false) => SLOWER,
        (false, true) => SLOWER_LIMITED,
    };
    let (left, right) = (one.min(x(bar.rate)), one.max(x(bar.rate)));
    let corners = [(left, top + GAP), (right, top + LINE as i32 - GAP)];
    root.draw(&Rectangle::new(corners, color.filled()))?;
    let spread = bar.spread.map_or((left, right), |(low, high)| (x(low), x(high)));
    if bar.spread.is_some() {
        draw_spread(root, spread, middle)?;
    }
    draw_label(root, &bar.label, middle)?;
    let faint = Style { color: FAINT, ..Style::default() };
    write(root, &bar.peer, (PEER_BEGIN, middle), &faint)?;
    let (x, column) = if bar.rate >= 1.0 {
        (right.max(spread.1) + LABEL_GAP, HPos::Left)
    } else {
        (left.min(spread.0) - LABEL_GAP, HPos::Right)
    };
    write(root, &format!("{:.2}", bar.rate), (x, middle), &Style { column, ..Style::default() })
}

/// A thin line with strokes at its ends.
fn draw_spread(root: &Canvas<'_>, (left, right): (i32, i32), y: i32) -> Result<(), Trouble> {
    let style = INK.stroke_width(1);
    root.draw(&PathElement::new([(left, y), (right, y)], style))?;
    for x in [left, right] {
        root.draw(&PathElement::new([(x, y - STROKE), (x, y + STROKE)], style))?;
    }
    Ok(())
}

fn draw_label(root: &Canvas<'_>, label: &Label, y: i32) -> Result<(), Trouble> {
    let cell = match label {
        Label::Mean(text) => return write(root, text, (MARGIN, y), &Style::default()),
        Label::Cell(cell) => cell,
    };
    for (text, x, column) in [
        (cell.block_words(), BLOCK_END, HPos::Right),
        (work(cell), WORK_BEGIN, HPos::Left),
        (cell.depth.to_string(), DEPTH_END, HPos::Right),
        (cell.sessions.to_string(), SESSIONS_END, HPos::Right),
    ] {
        write(root, &text, (x, y), &Style { column, ..Style::default() })?;
    }
    Ok(())
}

fn work(cell: &Cell) -> String {
    let work = match cell.work {
        Work::Read => "reads",
        Work::Write => "writes",
        Work::Mixed => "mixed",
    };
    if cell.is_sequential() { work.to_owned() } else { format!("random {work}") }
}

/// When, where and how this was measured.
fn draw_caption(root: &Canvas<'_>, about: &About, bottom: i32) -> Result<(), Trouble> {
    let About { machine, rounds, seconds, .. } = about;
    let text = format!(
        "{}, flexnbd {}, {}, {} CPUs, Linux {}. Medians of {rounds} rounds of {seconds} s.",
        machine.date, machine.commit, machine.processor, machine.cpus, machine.kernel
    );
    let faint = Style { color: FAINT, size: SMALL, ..Style::default() };
    write(root, &text, (MARGIN, bottom - 34), &faint)?;
    let command = Style { family: "monospace", ..faint };
    write(root, &machine.command, (MARGIN, bottom - 15), &command)
}

/// How text looks; in the middle of a line.
#[derive(Clone, Copy)]
struct Style {
    size: u32,
    bold: bool,
    color: RGBColor,
    column: HPos,
    family: &'static str,
}

impl Default for Style {
    fn default() -> Self {
        Self { size: USUAL, bold: false, color: INK, column: HPos::Left, family: "sans-serif" }
    }
}

fn write(root: &Canvas<'_>, text: &str, at: (i32, i32), style: &Style) -> Result<(), Trouble> {
    let weight = if style.bold { FontStyle::Bold } else { FontStyle::Normal };
    let font = FontDesc::new(FontFamily::from(style.family), f64::from(style.size) * PIXEL, weight);
    let text_style = font.color(&style.color).pos(Pos::new(style.column, VPos::Center));
    Ok(root.draw_text(text, &text_style, at)?)
}

#[cfg(test)]
#[allow(unused)] // See peers.rs.
mod tests {
    use super::super::cells::tests::against_one_peer;
    use super::super::grid::Set;
    use super::super::report::AboutServer;
    use super::*;

    /// Every default cell, the ratios going up from 0.6 by a tenth.
    fn cells() -> Vec<CellReport> {
        let cells = Set::Default.cells().into_iter().enumerate();
        let rates = |at: usize| {
            let rate = 0.6 + 0.1 * at as f64;
            [rate, rate * 0.9, rate * 1.1]
        };
        cells.map(|(at, cell)| against_one_peer(cell, &rates(at))).collect()
    }

    fn report() -> Report {
        let server = |name: &str, version: &str| AboutServer {
            name: name.to_owned(),
            version: version.to_owned(),
            ..AboutServer::default()
        };
        let servers = vec![server("nbdkit", "nbdkit 1.32.5 (x)"), server("nbd-server", "3.24")];
        let about = About { servers, ..About::default() };
        Report { about, cells: cells(), memory: Vec::new(), activation: Vec::new() }
    }

    #[test]
    fn every_cell_has_a_bar_under_the_heading_of_its_group() {
        let lines = lines(&cells());
        let mut heading = String::new();
        let mut bars = 0;
        for line in &lines {
            match line {
                Line::Heading(text) => heading.clone_from(text),
                Line::Bar(Bar { label: Label::Mean(_), .. }) => {
                    assert_eq!(heading, "Geometric means");
                }
                Line::Bar(Bar { label: Label::Cell(cell), .. }) => {
                    let Cell { source, temperature, transport, .. } = *cell;
                    assert_eq!(heading, super::heading(source, temperature, transport));
                    bars += 1;
                }
            }
        }
        assert_eq!(bars, Set::Default.cells().len());
    }

    #[test]
    fn the_scale_holds_every_spread_between_powers_of_two() {
        let bar = |low, high| {
            let bar = mean_bar(&summary::means(&cells())[0]);
            Line::Bar(Bar { rate: 1.0, spread: Some((low, high)), ..bar })
        };
        assert_eq!(scale(&[bar(0.9, 1.1)]), SCALE);
        assert_eq!(scale(&[bar(0.3, 1.1), bar(1.0, 4.1)]), (0.25, 8.0));
        assert_eq!(scale(&[bar(0.51, 3.9)]), (0.25, 8.0));
        let told: Vec<String> = ticks((0.25, 2.0)).into_iter().map(times).collect();
        assert_eq!(told, ["× 1/4", "× 1/2", "× 1", "× 2"]);
    }

    #[test]
    fn a_picture_is_drawn_with_its_peers_and_command() {
        let mut report = report();
        report.about.machine.command = "cargo bench --bench peers".to_owned();
        let file = tempfile::NamedTempFile::new().unwrap();
        draw(&report, file.path()).unwrap();
        let svg = std::fs::read_to_string(file.path()).unwrap();
        assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"));
        for told in ["nbdkit 1.32.5, nbd-server 3.24", "cargo bench --bench peers", "random reads"]
        {
            assert!(svg.contains(told), "{told}");
        }
    }

    #[test]
    fn nothing_is_drawn_of_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("picture");
        assert!(draw(&Report { cells: Vec::new(), ..report() }, &file).is_err());
        assert!(!file.exists());
    }
}
