//! The documentation, enforced: short sentences, no words of [`PRIVATE_WORDS`], an example device and file names that are current.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a failure here is the test's")]

use std::fs;
use std::path::{Path, PathBuf};

/// Words of a sentence, and of the first one of a public item or a file.
const MAX_WORDS: usize = 25;
const MAX_FIRST_WORDS: usize = 15;

/// Pages for people who use or change the crate.
const PAGES: &[&str] = &[
    "README.md",
    "ARCHITECTURE.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "benches/README.md",
    "docs/guide.md",
    "lab/README.md",
];

/// Words that leave the party or the mechanism unnamed. No page, no comment and no message of the library has them.
const PRIVATE_WORDS: &[&str] = &[
    "nobody",
    "everybody",
    "somebody",
    "whoever",
    "told",
    "untold",
    "hear",
    "hears",
    "heard",
    "patience",
    "under way",
    "begun anew",
    "comes to rest",
];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// All files of the library, beneath `src`.
fn sources() -> Vec<PathBuf> {
    let found = rust_files(&["src"]);
    assert!(found.len() > 40, "the sources were not found");
    found
}

/// All Rust files beneath these directories of the repository.
fn rust_files(directories: &[&str]) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut directories: Vec<_> =
        directories.iter().map(|name| root().join(name)).filter(|path| path.exists()).collect();
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            match path.extension() {
                _ if path.is_dir() => directories.push(path),
                Some(extension) if extension == "rs" => found.push(path),
                _ => {}
            }
        }
    }
    found
}

/// The text of a line of documentation, without its mark.
fn documentation(line: &str) -> Option<&str> {
    let line = line.trim_start();
    // Code that is compiled only with a feature begins so; a second line says what it is without.
    if line.contains("doc = \"```no_run\"") {
        return Some("```");
    }
    line.strip_prefix("///").or_else(|| line.strip_prefix("//!"))
}

/// The paragraphs of Markdown, each with its line, without code, headings and tables.
fn paragraphs<'a>(lines: impl Iterator<Item = (usize, Option<&'a str>)>) -> Vec<(usize, String)> {
    let (mut all, mut now, mut fenced) = (Vec::new(), None::<(usize, String)>, false);
    for (number, line) in lines {
        let text = line.unwrap_or_default().trim();
        let item = text.starts_with("- ") || text.split_once(". ").is_some_and(|(n, _)| n.parse::<u32>().is_ok());
        let fence = text.starts_with("```");
        let code = fenced || line.is_some_and(|line| line.starts_with("     ") && now.is_none());
        if text.is_empty() || fence || item || code || text.starts_with('#') || text.starts_with('|') {
            all.extend(now.take());
        }
        fenced ^= fence;
        if text.is_empty() || fence || code || text.starts_with('#') || text.starts_with('|') {
            continue;
        }
        let (_, paragraph) = now.get_or_insert((number, String::new()));
        paragraph.push(' ');
        paragraph.push_str(text.trim_start_matches("- "));
    }
    all.extend(now);
    all
}

/// Code and link targets count as one word, or none.
fn plain(text: &str) -> String {
    let mut plain = String::new();
    for (n, piece) in text.split('`').enumerate() {
        plain.push_str(if n % 2 == 0 { piece } else { "Code" });
    }
    while let Some(at) = plain.find("](") {
        let end = plain[at..].find(')').map_or(plain.len(), |end| at + end + 1);
        plain.replace_range(at..end, "]");
    }
    plain
}

fn sentences(paragraph: &str) -> Vec<String> {
    let text = plain(paragraph);
    let (mut all, mut now) = (Vec::new(), Vec::new());
    let words: Vec<&str> = text.split_whitespace().collect();
    for (n, word) in words.iter().enumerate() {
        now.push(*word);
        let bare = word.trim_end_matches(['"', ')', ']', '*']);
        let next = words.get(n + 1).and_then(|next| next.trim_start_matches(['[', '"', '(', '*']).chars().next());
        let ends = bare.ends_with(['.', '!', '?']) && next.is_none_or(|c| c.is_uppercase() || c.is_ascii_digit());
        if ends || n + 1 == words.len() {
            all.push(now.join(" "));
            now.clear();
        }
    }
    all
}

fn words(sentence: &str) -> usize {
    sentence.split_whitespace().filter(|word| word.contains(char::is_alphanumeric)).count()
}

fn check(path: &Path, paragraphs: Vec<(usize, String)>, problems: &mut Vec<String>) {
    for (number, paragraph) in paragraphs {
        for sentence in sentences(&paragraph).iter().filter(|sentence| words(sentence) > MAX_WORDS) {
            problems.push(format!("{}:{}: {} words: {sentence}", path.display(), number + 1, words(sentence)));
        }
    }
}

/// The private words that begin on each line, with its number. A phrase may end on the next line.
fn private_words(lines: &[Option<&str>]) -> Vec<(usize, &'static str)> {
    let separate = |line: Option<&str>| {
        let text = plain(line.unwrap_or_default()).to_lowercase();
        let words = text.split(|c: char| !c.is_alphanumeric() && c != '_').filter(|word| !word.is_empty());
        words.fold(String::from(" "), |all, word| all + word + " ")
    };
    let mut found = Vec::new();
    for (number, line) in lines.iter().enumerate() {
        let own = separate(*line);
        let text = format!("{own}{}", separate(lines.get(number + 1).copied().flatten()).trim_start());
        let begins = |word: &&&str| text.find(&format!(" {word} ")).is_some_and(|at| at + 1 < own.len());
        found.extend(PRIVATE_WORDS.iter().filter(begins).map(|word| (number, *word)));
    }
    found
}

/// What each line of a Rust file has of comments of all kinds, and of string literals.
fn comments_and_strings(text: &str) -> (Vec<String>, Vec<String>) {
    enum State {
        Code,
        Comment,
        /// As deep as block comments are nested.
        Block(usize),
        String,
        /// Ends with a quote and as many `#`.
        Raw(usize),
    }
    let (mut comments, mut strings, mut state) = (Vec::new(), Vec::new(), State::Code);
    for line in text.lines() {
        let (mut comment, mut string, mut rest, mut before) = (String::new(), String::new(), line, ' ');
        if matches!(state, State::Comment) {
            state = State::Code;
        }
        while let Some(c) = rest.chars().next() {
            let hashes = |text: &str| text.len() - text.trim_start_matches('#').len();
            let mut len = c.len_utf8();
            match &mut state {
                State::Code if rest.starts_with("//") => (state, len) = (State::Comment, 2),
                State::Code if rest.starts_with("/*") => (state, len) = (State::Block(1), 2),
                State::Code if c == 'r' && !before.is_alphanumeric() && before != '_' || c == 'r' && before == 'b' => {
                    let count = hashes(&rest[1..]);
                    if rest[1 + count..].starts_with('"') {
                        (state, len) = (State::Raw(count), count + 2);
                    }
                }
                State::Code if c == '"' => state = State::String,
                // A quote begins a literal of one character, or a lifetime, whose rest is code.
                State::Code if c == '\'' => {
                    let character = rest[1..].chars().next().map_or(0, char::len_utf8);
                    len = match rest[1..].strip_prefix('\\') {
                        Some(escaped) => escaped[1..].find('\'').map_or(rest.len(), |end| end + 4),
                        None if rest[1 + character..].starts_with('\'') => character + 2,
                        None => 1,
                    };
                }
                State::Code => {}
                State::Block(depth) if rest.starts_with("*/") => {
                    (*depth, len) = (*depth - 1, 2);
                    if *depth == 0 {
                        state = State::Code;
                    }
                }
                State::Block(depth) if rest.starts_with("/*") => (*depth, len) = (*depth + 1, 2),
                State::String if c == '\\' => {
                    len += rest[1..].chars().next().map_or(0, char::len_utf8);
                    string.push(' ');
                }
                State::Raw(count) if c == '"' && hashes(&rest[1..]) >= *count => {
                    len += *count;
                    state = State::Code;
                    string.push(' ');
                }
                State::String if c == '"' => {
                    state = State::Code;
                    string.push(' ');
                }
                State::Comment | State::Block(_) => comment.push(c),
                State::String | State::Raw(_) => string.push(c),
            }
            before = c;
            rest = &rest[len..];
        }
        comments.push(comment);
        strings.push(string);
    }
    (comments, strings)
}

/// Which lines are items that only tests have, in code that is formatted.
fn test_lines(text: &str) -> Vec<bool> {
    let (mut all, mut indent) = (Vec::new(), None);
    for line in text.lines() {
        let own = line.len() - line.trim_start().len();
        if indent.is_none() && line.trim() == "#[cfg(test)]" {
            indent = Some(own);
        }
        all.push(indent.is_some());
        if indent == Some(own) && line.ends_with(['}', ';', ',']) {
            indent = None;
        }
    }
    all
}

/// Whether the whole file is tests'.
fn is_test(path: &Path) -> bool {
    path.components()
        .any(|part| matches!(part.as_os_str().to_str(), Some("tests" | "tests.rs" | "fuzzing" | "fuzzing.rs")))
}

/// The first sentences of files and of public items, with their lines.
fn first_sentences(text: &str) -> Vec<(usize, String)> {
    let lines: Vec<&str> = text.lines().collect();
    let mut all = Vec::new();
    for (begin, line) in lines.iter().enumerate() {
        let block = line.trim_start().starts_with("///")
            && begin
                .checked_sub(1)
                .is_none_or(|before| documentation(lines[before]).is_none() && !lines[before].contains("doc = "));
        let end = begin + lines[begin..].iter().take_while(|line| documentation(line).is_some()).count();
        let item = lines[end..].iter().find(|line| !line.trim_start().starts_with(['#', '/']));
        let public = item.is_some_and(|item| item.trim_start().starts_with("pub "));
        if begin == 0 || block && public {
            let paragraphs = paragraphs(lines[begin..end].iter().map(|line| documentation(line)).enumerate());
            let first = paragraphs.first().and_then(|(_, text)| sentences(text).into_iter().next());
            all.extend(first.map(|first| (begin, first)));
        }
    }
    all
}

#[test]
fn first_sentences_have_at_most_15_words() {
    let (mut problems, mut count) = (Vec::new(), 0);
    for path in sources() {
        for (number, first) in first_sentences(&fs::read_to_string(&path).unwrap()) {
            count += 1;
            if words(&first) > MAX_FIRST_WORDS {
                problems.push(format!("{}:{}: {} words: {first}", path.display(), number + 1, words(&first)));
            }
        }
    }
    assert!(problems.is_empty(), "shorten these:\n{}", problems.join("\n"));
    assert!(count > 500, "{count} were found");
}

#[test]
fn sentences_have_at_most_25_words() {
    let mut problems = Vec::new();
    for path in sources() {
        let text = fs::read_to_string(&path).unwrap();
        check(&path, paragraphs(text.lines().map(documentation).enumerate()), &mut problems);
    }
    for page in PAGES {
        let text = fs::read_to_string(root().join(page)).unwrap();
        check(Path::new(page), paragraphs(text.lines().map(Some).enumerate()), &mut problems);
    }
    assert!(problems.is_empty(), "split these:\n{}", problems.join("\n"));
}

#[test]
fn a_long_sentence_is_found() {
    let long = format!("It is {} and ends here. Another.", "very ".repeat(25));
    let found = paragraphs(long.lines().map(Some).enumerate());
    let mut problems = Vec::new();
    check(Path::new("page"), found, &mut problems);
    assert_eq!(problems.len(), 1, "{problems:?}");
    let code = format!("```text\n{long}\n```\n\n| {long} |");
    assert!(paragraphs(code.lines().map(Some).enumerate()).is_empty());
    assert_eq!(sentences("See [`Vm`](crate::Vm. Or x). `a.b` is one. Two (Virtio 1.3, 5.2.6): yes.").len(), 3);
}

#[test]
fn no_private_words_in_pages_comments_and_messages() {
    let mut problems = Vec::new();
    let mut look = |path: &Path, lines: Vec<Option<&str>>| {
        let path = path.strip_prefix(root()).unwrap_or(path).display();
        problems.extend(private_words(&lines).iter().map(|(number, word)| format!("{path}:{}: {word}", number + 1)));
    };
    for path in rust_files(&["src", "tests", "benches", "examples", "fuzz/fuzz_targets", "guest"]) {
        let text = fs::read_to_string(&path).unwrap();
        let (comments, strings) = comments_and_strings(&text);
        look(&path, comments.iter().map(|comment| Some(comment.as_str())).collect());
        if path.starts_with(root().join("src")) && !is_test(path.strip_prefix(root()).unwrap()) {
            let lines = strings.iter().zip(test_lines(&text));
            look(&path, lines.map(|(string, test)| (!test).then_some(string.as_str())).collect());
        }
    }
    for page in PAGES {
        let text = fs::read_to_string(root().join(page)).unwrap();
        look(Path::new(page), text.lines().map(Some).collect());
    }
    assert!(problems.is_empty(), "name the party or the mechanism:\n{}", problems.join("\n"));
}

#[test]
fn comments_and_strings_are_separated_from_code() {
    let text = r##"
let told = '"'; // One. "Two"
let a: &'static str = "three // four \" five"; /* six
seven */ call(r#"eight " nine"#, b"ten", '\'', r"c:\", 'x'); //! Eleven
let b = "twelve \
    thirteen"; // fourteen
"##;
    let (comments, strings) = comments_and_strings(text);
    let join = |all: Vec<String>| all.join(" ").split_whitespace().collect::<Vec<_>>().join(" ");
    assert_eq!(join(comments), "One. \"Two\" six seven ! Eleven fourteen");
    assert_eq!(join(strings), "three // four five eight \" nine ten c:\\ twelve thirteen");
    let text = "a();\n#[cfg(test)]\nmod tests {\n    b();\n}\n#[cfg(test)]\nmod more;\nc();";
    assert_eq!(test_lines(text), [false, true, true, true, true, true, true, false]);
    assert!(
        is_test(Path::new("src/a/tests/b.rs")) && is_test(Path::new("src/tests.rs")) && !is_test(Path::new("src/a.rs"))
    );
}

#[test]
fn a_private_word_is_found() {
    let text = "/// Nobody's, and it is under\n/// way. `heard`, foretold, told_closed.\nlet told = 1; // told";
    let lines: Vec<_> = text.lines().map(documentation).collect();
    assert_eq!(private_words(&lines), [(0, "nobody"), (0, "under way")]);
    assert_eq!(private_words(&[Some("It is"), Some("told.")]), [(1, "told")]);
}

#[test]
fn the_device_of_the_architecture_is_the_one_that_runs() {
    let page = fs::read_to_string(root().join("ARCHITECTURE.md")).unwrap();
    let device = fs::read_to_string(root().join("src/virtio/example.rs")).unwrap();
    assert!(page.contains(&format!("```rust\n{device}```")), "copy src/virtio/example.rs into ARCHITECTURE.md");
    assert!(device.lines().count() <= 40, "the example is to be short");
}

#[test]
fn files_that_the_pages_name_are_there() {
    for page in ["ARCHITECTURE.md", "CONTRIBUTING.md"] {
        let text = fs::read_to_string(root().join(page)).unwrap();
        // A backtick in a drawing is none around a name.
        let text: String = text.split("```").step_by(2).collect();
        let code = text.split('`').skip(1).step_by(2);
        let named = code.filter(|name| name.ends_with(".rs") && !name.contains(['*', '{', ' ']));
        let mut count = 0;
        for name in named {
            let there = sources().iter().any(|path| path.ends_with(name)) || root().join(name).exists();
            assert!(there, "{page} names {name}, which is not there");
            count += 1;
        }
        assert!(count > 3, "{page} names no files");
    }
}
