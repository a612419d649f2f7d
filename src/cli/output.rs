//! Standard output: tables for people, JSON for programs.

use std::fmt::Display;
use std::io::Write;

use comfy_table::{CellAlignment, Table, presets};
use serde::Serialize;

use super::error::CliError;

/// How the cells of a column are aligned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Align {
    Left,
    Right,
}

/// Columns under their headers, two spaces apart, without lines and colours, for people and for
/// `grep`. A row is one line, however long.
pub fn table(headers: &[(&str, Align)], rows: impl IntoIterator<Item = Vec<String>>) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).force_no_tty();
    table.set_header(headers.iter().map(|(name, _)| *name));
    table.add_rows(rows);
    for (column, (_, align)) in table.column_iter_mut().zip(headers) {
        column.set_padding((0, 2));
        column.set_cell_alignment(match align {
            Align::Left => CellAlignment::Left,
            Align::Right => CellAlignment::Right,
        });
    }
    table.trim_fmt()
}

/// A message on one line, also if its parts contain ends of lines.
pub fn one_line(message: impl Display) -> String {
    message.to_string().lines().map(str::trim).collect::<Vec<_>>().join(" ")
}

/// Writes `text` and the end of a line.
pub fn print(text: &str) -> Result<(), CliError> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{text}").and_then(|()| out.flush()).map_err(CliError::Output)
}

/// Writes `value` as JSON.
pub fn print_json(value: &impl Serialize) -> Result<(), CliError> {
    let json =
        serde_json::to_string_pretty(value).map_err(|error| CliError::Output(error.into()))?;
    print(&json)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up_without_colour_or_trailing_space() {
        let rows = [["2", "a"], ["10", "bb"]].map(|row| row.map(str::to_owned).to_vec());
        let text = table(&[("ID", Align::Right), ("NAME", Align::Left)], rows);
        assert_eq!(text, "ID  NAME\n 2  a\n10  bb");
    }

    #[test]
    fn a_long_cell_stays_on_its_line() {
        let cell = "k".repeat(4_096);
        let text = table(&[("KEY", Align::Left)], [vec![cell.clone()]]);
        assert_eq!(text.lines().collect::<Vec<_>>(), ["KEY", &cell]);
    }
}
