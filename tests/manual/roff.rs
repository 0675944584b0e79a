//! Parser for the subset of mdoc(7) in our pages: sections, list items and literal blocks.
//! Never renders a page.

use std::collections::{BTreeMap, BTreeSet};

/// A manual page in its source form.
pub(crate) struct Page(Vec<Line>);

/// A line and its position.
struct Line {
    /// `SECTION`, or `SECTION/subsection`.
    place: String,
    /// The text, with `\-` and `\e` replaced by the characters that they print.
    text: String,
    /// The index of the enclosing `.Bd` block in the page.
    block: Option<usize>,
}

impl Page {
    pub(crate) fn parse(source: &str) -> Self {
        let (mut section, mut place, mut block) = (String::new(), String::new(), None);
        let mut blocks = 0..;
        let mut lines = Vec::new();
        for text in source.lines().filter(|line| !line.starts_with(r#".\""#)) {
            let text = text.replace(r"\-", "-").replace(r"\e", r"\").replace(r"\ ", " ");
            match text.split_once(' ').unwrap_or((&text, "")) {
                (".Sh", name) => (section, place) = (name.to_owned(), name.to_owned()),
                (".Ss", name) => place = format!("{section}/{name}"),
                (".Bd", _) => block = blocks.next(),
                (".Ed", _) => block = None,
                _ => lines.push(Line { place: place.clone(), text, block }),
            }
        }
        Self(lines)
    }

    /// The subsections of a section, in order.
    pub(crate) fn subsections(&self, section: &str) -> Vec<&str> {
        let prefix = format!("{section}/");
        let mut found: Vec<&str> =
            self.0.iter().filter_map(|line| line.place.strip_prefix(&prefix)).collect();
        found.dedup();
        found
    }

    /// The headings of list items in a section, without `.It`.
    pub(crate) fn items(&self, place: &str) -> Vec<&str> {
        self.at(place).filter_map(|line| line.strip_prefix(".It ")).collect()
    }

    /// The text of a list item, on one line.
    pub(crate) fn item_text(&self, place: &str, item: &str) -> String {
        let heading = format!(".It {item}");
        let mut after = self.at(place).skip_while(|line| *line != heading);
        assert!(after.next().is_some(), "{place} has no item `{item}`");
        let text = after.take_while(|line| !line.starts_with(".It ") && *line != ".El");
        let words = text.map(|line| match line.strip_prefix('.') {
            Some(macros) => macros.split_once(' ').map_or("", |(_, arguments)| arguments),
            None => line,
        });
        words.collect::<Vec<_>>().join(" ")
    }

    /// The lines of a section outside literal blocks.
    pub(crate) fn at(&self, place: &str) -> impl Iterator<Item = &str> {
        self.0
            .iter()
            .filter(move |line| line.block.is_none() && line.place == place)
            .map(|line| line.text.as_str())
    }

    /// The lines in literal blocks; a line that ends in `\` is joined with the next.
    pub(crate) fn literal(&self) -> Vec<String> {
        let shown = self.0.iter().filter(|line| line.block.is_some());
        let text: Vec<&str> = shown.map(|line| line.text.as_str()).collect();
        text.join("\n").replace("\\\n", " ").lines().map(str::to_owned).collect()
    }

    /// The literal blocks of a section and its subsections.
    pub(crate) fn blocks(&self, section: &str) -> Vec<String> {
        let is_within = |place: &str| place.split('/').next() == Some(section);
        let mut blocks: BTreeMap<usize, String> = BTreeMap::new();
        for line in self.0.iter().filter(|line| is_within(&line.place)) {
            if let Some(block) = line.block {
                blocks.entry(block).or_default().push_str(&format!("{}\n", line.text));
            }
        }
        blocks.into_values().collect()
    }

    /// Every option named outside the synopsis, where short options are bundled.
    pub(crate) fn options(&self) -> BTreeSet<String> {
        let lines = self.0.iter().filter(|line| line.place != "SYNOPSIS" && line.block.is_none());
        lines
            .flat_map(|line| arguments_of("Fl", &line.text))
            .map(|name| format!("-{name}"))
            .collect()
    }
}

/// The arguments of a macro with one argument, such as `Fl`, in a macro line.
pub(crate) fn arguments_of(name: &str, line: &str) -> Vec<String> {
    let Some(line) = line.strip_prefix('.') else { return Vec::new() };
    let words: Vec<&str> = line.split_whitespace().collect();
    let follows = words.windows(2).filter(|pair| pair[0] == name);
    follows.map(|pair| pair[1].to_owned()).collect()
}

/// Converts `Fl f , Fl -file Ar FILE` to `-f, --file FILE`.
pub(crate) fn plain(item: &str) -> String {
    let mut text = String::new();
    let mut words = item.split_whitespace();
    while let Some(word) = words.next() {
        match word {
            "," => text.push(','),
            "Fl" => text.push_str(&format!(" -{}", words.next().unwrap())),
            "Ar" | "Va" | "Ic" => text.push_str(&format!(" {}", words.next().unwrap())),
            other => text.push_str(&format!(" {other}")),
        }
    }
    text.trim().to_owned()
}
