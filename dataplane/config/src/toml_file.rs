//! The TOML file, read and written.

mod reader;
mod words;
mod writer;

use toml::de::DeTable;

use crate::config::Config;
use crate::limits;
use crate::problem::{Problem, Problems, position};

impl Config {
    /// Reads the TOML format. All problems of the file come back, not only the first.
    pub fn from_toml(text: &str) -> Result<Self, Problems> {
        let whole = |problem| Err(Problems(vec![problem]));
        if text.len() > limits::CONFIG_BYTES_MAX {
            return whole(Problem {
                position: None,
                key: String::new(),
                seen: format!("the file has {} bytes", text.len()),
                expected: format!("at most {}", limits::CONFIG_BYTES_MAX),
                cure: "check that this is the right file".to_owned(),
            });
        }
        let document = match DeTable::parse(text) {
            Ok(document) => document,
            Err(error) => {
                return whole(Problem {
                    position: error.span().map(|span| position(text, span.start)),
                    key: String::new(),
                    seen: error.message().replace('\n', ", "),
                    expected: "TOML".to_owned(),
                    cure: "mend the line; strings stand in double quotes".to_owned(),
                });
            }
        };
        let mut reader = reader::Reader::new(text);
        let config = reader.document(&document);
        if reader.problems.is_empty() { Ok(config) } else { Err(Problems::new(reader.problems)) }
    }

    /// Writes the TOML format; reading it gives an equal configuration. An inline secret becomes a
    /// comment: secrets live in files.
    pub fn to_toml(&self) -> String {
        let mut out = String::from("schema = 1\n");
        writer::interface(&mut out, &self.interface);
        writer::dataplane(&mut out, &self.dataplane);
        writer::offload(&mut out, &self.offload);
        writer::discovery(&mut out, &self.discovery);
        for peer in &self.peers {
            writer::peer(&mut out, peer);
        }
        out
    }
}

#[cfg(test)]
mod tests;
