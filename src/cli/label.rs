//! `greenroom label`: files, folders and patterns of them; what is printed of their labels.

use std::{
    collections::{HashMap, HashSet},
    fs,
    io::{self, Write},
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::Context as _;
use clap::{Arg, ArgAction, ArgGroup, ArgMatches, Command, value_parser};
use serde_json::json;

use super::{
    Unprinted, Usage,
    progress::{LastLine, clock, gauge},
    usage::csv_text,
};
use crate::{
    app::{self, AskedPrompt, LabelJob, Labelled},
    config::Mode,
    label::{DEFAULT, Entry, Image, MAX_IMAGES, Outcome, Progress, PromptError, Summary},
    telemetry,
};

/// Files that a folder is looked through for. The last ones cannot be labelled, and are told of.
const ENDINGS: [&str; 11] = [
    "png", "jpg", "jpeg", "webp", "gif", "bmp", "avif", "heic", "heif", "tif", "tiff",
];
/// How deep folders are looked through.
const MAX_DEPTH: usize = 32;
const COLUMNS: &str =
    "image,status,nsfw_rating,description,tags,model,cached,cost_usd,duration_ms,code,message";

pub(super) fn command() -> Command {
    let flag = |name: &'static str, help: &'static str| {
        Arg::new(name)
            .long(name)
            .action(ArgAction::SetTrue)
            .help(help)
    };
    let command = Command::new("label")
        .about("Label images: what they show, for whom they are fit, tags")
        .arg(
            Arg::new("paths")
                .value_name("PATH")
                .required(true)
                .num_args(1..)
                .value_parser(value_parser!(PathBuf))
                .help("Files, folders, and patterns as 'photos/**/*.jpg'"),
        )
        .arg(
            Arg::new("prompt-type")
                .long("prompt-type")
                .value_name("NAME")
                .help("default, sd_training, or one of a prompt file [default: default]"),
        )
        .arg(
            Arg::new("prompt")
                .long("prompt")
                .value_name("TEXT")
                .conflicts_with_all(["prompt-type", "prompt-file"])
                .help("A prompt of your own"),
        )
        .arg(
            Arg::new("prompt-file")
                .long("prompt-file")
                .value_name("FILE")
                .value_parser(value_parser!(PathBuf))
                .help("A prompt of your own, as text; or several by name, as .yaml"),
        )
        .arg(super::label_model())
        .arg(
            Arg::new("workers")
                .long("workers")
                .value_name("N")
                .value_parser(value_parser!(u16).range(1..=64))
                .default_value("3")
                .help("Images at once"),
        )
        .arg(super::max_usd())
        .arg(
            Arg::new("journal")
                .long("journal")
                .value_name("FILE")
                .value_parser(value_parser!(PathBuf))
                .help("Where it is noted what is done; else a file for each different command"),
        )
        .arg(flag(
            "retry-failed",
            "Ask again about what failed although that may have been paid",
        ))
        .arg(flag(
            "no-cache",
            "Ask about the same bytes as often as they come, and again when all is done",
        ))
        .arg(flag(
            "captions",
            "Write each description to a .txt beside its image, unless a person's is there",
        ))
        .arg(flag("replace-captions", "Write captions over whatever is there").requires("captions"))
        .arg(flag(
            "dry-run",
            "Say how many images there are and what they may cost at most",
        ))
        .arg(super::json())
        .arg(flag(
            "jsonl",
            "Print one JSON object a line, as each is done",
        ))
        .arg(flag("csv", "Print CSV, as each is done"))
        .group(ArgGroup::new("form").args(["json", "jsonl", "csv"]))
        .arg(super::rehearsal());
    super::with_settings(command)
}

pub(super) fn run(args: &ArgMatches) -> anyhow::Result<()> {
    let loaded = super::load(args, Mode::Inspect)?;
    let paths: Vec<PathBuf> = args
        .get_many::<PathBuf>("paths")
        .unwrap_or_default()
        .cloned()
        .collect();
    let images = find(&paths, args.get_flag("captions"))?;
    let names: Vec<String> = images.iter().map(|image| image.name.clone()).collect();
    let text = |name: &str| args.get_one::<String>(name).cloned();
    let most_usd = args.get_one::<f64>("max-usd").copied();
    if most_usd.is_some_and(|most| !(most.is_finite() && most > 0.0)) {
        return Err(Usage("--max-usd has to be a number of dollars above 0".to_owned()).into());
    }
    let cwd = std::env::current_dir().context("failed to find the working directory")?;
    let mut named_by = paths.clone();
    named_by.sort();
    let job = LabelJob {
        images,
        prompt: prompt(
            text("prompt"),
            text("prompt-type"),
            args.get_one("prompt-file"),
        )?,
        model: text("model"),
        workers: usize::from(args.get_one::<u16>("workers").copied().unwrap_or(3)),
        uses_cache: !args.get_flag("no-cache"),
        replaces_captions: args.get_flag("replace-captions"),
        asks_again: args.get_flag("retry-failed"),
        most_usd,
        named_by: format!("{} {named_by:?}", cwd.display()),
        journal: args.get_one::<PathBuf>("journal").cloned(),
        is_dry: args.get_flag("dry-run"),
    };
    if let Some(model) = &job.model
        && !crate::label::is_model_name(model)
    {
        return Err(Usage("--model is no name of a model".to_owned()).into());
    }
    super::start_watched_log(&loaded.settings)?;
    let form = match args.get_one::<clap::Id>("form").map(clap::Id::as_str) {
        Some("json") => Form::Json(Vec::new()),
        Some("jsonl") => Form::Lines,
        Some("csv") => Form::Csv,
        _ => Form::People,
    };
    let mut printer = Printer::new(form, names);
    let runtime = super::runtime()?;
    let labelled = runtime.block_on(app::label(loaded, job, |entry, progress| {
        printer.entry(entry, progress)
    }));
    runtime.shutdown_timeout(Duration::from_millis(500));
    printer.end(labelled.map_err(as_usage)?)
}

/// Who names a prompt that there is not has typed something wrong.
fn as_usage(error: anyhow::Error) -> anyhow::Error {
    match error.downcast_ref::<PromptError>() {
        Some(PromptError::Unknown { .. } | PromptError::Empty | PromptError::TooLong) => {
            Usage(error.to_string()).into()
        }
        _ => error,
    }
}

fn prompt(
    own: Option<String>,
    name: Option<String>,
    file: Option<&PathBuf>,
) -> anyhow::Result<AskedPrompt> {
    if let Some(text) = own {
        return Ok(AskedPrompt::Own(text));
    }
    let is_yaml = file.is_some_and(|file| {
        let ending = file.extension().unwrap_or_default();
        ending == "yaml" || ending == "yml"
    });
    match file {
        Some(file) if !is_yaml => {
            if name.is_some() {
                let why = "--prompt-type is of a .yaml: the file is one prompt by itself";
                return Err(Usage(why.to_owned()).into());
            }
            let text = fs::read_to_string(file);
            let text = text.with_context(|| format!("--prompt-file: {}", file.display()))?;
            Ok(AskedPrompt::Own(text))
        }
        file => Ok(AskedPrompt::Named {
            name: name.unwrap_or_else(|| DEFAULT.to_owned()),
            file: file.map(std::path::absolute).transpose()?,
        }),
    }
}

/// The images that are meant, each once, in the order in which they were named.
fn find(paths: &[PathBuf], wants_captions: bool) -> anyhow::Result<Vec<Image>> {
    let mut files = Vec::new();
    for path in paths {
        if path.is_dir() {
            walk(path, 0, &mut files)?;
        } else if fs::symlink_metadata(path).is_ok() {
            files.push(path.clone());
        } else {
            files.extend(matching(path)?);
        }
    }
    let mut seen = HashSet::new();
    files.retain(|file| seen.insert(fs::canonicalize(file).unwrap_or_else(|_| file.clone())));
    if files.is_empty() {
        anyhow::bail!("there is no image in what was named");
    }
    if files.len() > MAX_IMAGES {
        anyhow::bail!("there are more than {MAX_IMAGES} images; name fewer at a time");
    }
    let images = files.into_iter().map(|path| Image {
        name: name_of(&path),
        caption: wants_captions.then(|| path.with_extension("txt")),
        prompt: None,
        path,
    });
    let images: Vec<Image> = images.collect();
    check_captions(&images)?;
    Ok(images)
}

/// What a file is called in answers and in the journal: its path, and no other file's. What of it is no
/// UTF-8 is written as `\xff`; in such a name, and in one that holds `\x` itself, a backslash is two.
fn name_of(path: &Path) -> String {
    if let Some(text) = path.to_str().filter(|text| !text.contains("\\x")) {
        return text.to_owned();
    }
    let mut name = String::new();
    for piece in path.as_os_str().as_bytes().utf8_chunks() {
        name.push_str(&piece.valid().replace('\\', "\\\\"));
        for byte in piece.invalid() {
            name.push_str(&format!("\\x{byte:02x}"));
        }
    }
    name
}

/// Refuses captions that would take an image's place, or each other's.
fn check_captions(images: &[Image]) -> Result<(), Usage> {
    // By where they lie: `a/x.png` and `./a/x.png` are one.
    let at = |path: &Path| {
        let folder = path.parent().filter(|folder| *folder != Path::new(""));
        let folder = fs::canonicalize(folder.unwrap_or(Path::new(".")));
        match (folder, path.file_name()) {
            (Ok(folder), Some(name)) => folder.join(name),
            _ => path.to_owned(),
        }
    };
    let refused = |caption: &Path, one: &str, what: &str| {
        Usage(format!(
            "--captions: {} would be the caption of {one} and {what}; rename one, or label them \
             apart",
            caption.display()
        ))
    };
    let mut taken: HashMap<PathBuf, &Image> = HashMap::new();
    let mut places: HashMap<PathBuf, &Image> = HashMap::new();
    for image in images.iter().filter(|image| image.caption.is_some()) {
        places.insert(at(&image.path), image);
        if let Ok(real) = fs::canonicalize(&image.path) {
            places.insert(real, image);
        }
    }
    for image in images {
        let Some(caption) = &image.caption else {
            continue;
        };
        let place = at(caption);
        if let Some(other) = places.get(&place) {
            let what = match other.name == image.name {
                true => "is that image itself".to_owned(),
                false => format!("is itself an image to be labelled ({})", other.name),
            };
            return Err(refused(caption, &image.name, &what));
        }
        if let Some(other) = taken.insert(place, image) {
            return Err(refused(caption, &other.name, &format!("of {}", image.name)));
        }
    }
    Ok(())
}

/// Images below a folder, by name; hidden files and links to folders are passed over.
fn walk(folder: &Path, depth: usize, files: &mut Vec<PathBuf>) -> anyhow::Result<()> {
    let entries = fs::read_dir(folder).with_context(|| format!("{}", folder.display()))?;
    let mut entries: Vec<_> = entries.collect::<Result<_, _>>()?;
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let path = entry.path();
        if entry.file_name().to_string_lossy().starts_with('.') {
            continue;
        }
        if entry.file_type()?.is_dir() {
            if depth < MAX_DEPTH {
                walk(&path, depth + 1, files)?;
            }
        } else if is_image(&path) && path.is_file() {
            files.push(path);
        }
    }
    Ok(())
}

fn is_image(path: &Path) -> bool {
    let ending = path.extension().and_then(|ending| ending.to_str());
    ending.is_some_and(|ending| {
        ENDINGS
            .iter()
            .any(|known| ending.eq_ignore_ascii_case(known))
    })
}

/// What a pattern matches that the shell left as it was.
fn matching(pattern: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let text = pattern.to_string_lossy();
    if !text.contains(['*', '?', '[']) {
        anyhow::bail!("{text}: there is no such file");
    }
    let found = glob::glob(&text).map_err(|error| Usage(format!("{text}: {error}")))?;
    let mut files = Vec::new();
    for path in found {
        let path = path.with_context(|| format!("{text}"))?;
        if path.is_file() {
            files.push(path);
        }
    }
    if files.is_empty() {
        anyhow::bail!("{text}: nothing matches");
    }
    Ok(files)
}

/// How it is printed.
enum Form {
    People,
    Lines,
    Csv,
    /// At the end, all together.
    Json(Vec<Entry>),
}

struct Printer {
    form: Form,
    /// Of all images, in their order.
    names: Vec<String>,
    last_line: LastLine,
    is_first: bool,
    failed: Option<io::Error>,
}

impl Printer {
    fn new(form: Form, names: Vec<String>) -> Self {
        Self {
            form,
            names,
            last_line: LastLine::new(),
            is_first: true,
            failed: None,
        }
    }

    /// Prints an outcome; whether to go on.
    fn entry(&mut self, entry: &Entry, progress: &Progress) -> bool {
        let line = match &mut self.form {
            Form::Json(entries) => {
                entries.push(entry.clone());
                None
            }
            Form::Lines => Some(serde_json::to_string(entry).expect("plain data serialises")),
            Form::Csv if self.is_first => Some(format!("{COLUMNS}\n{}", as_csv(entry))),
            Form::Csv => Some(as_csv(entry)),
            Form::People => Some(for_people(entry)),
        };
        self.is_first = false;
        self.last_line.clear();
        if let Some(line) = line
            && let Err(error) = writeln!(io::stdout(), "{line}")
        {
            self.failed = Some(error);
            return false;
        }
        self.last_line.show(|| bar(progress));
        true
    }

    fn end(mut self, labelled: Labelled) -> anyhow::Result<()> {
        self.last_line.clear();
        if let Some(error) = self.failed {
            return Err(Unprinted(error).into());
        }
        let summary = match labelled {
            Labelled::Done(summary) => summary,
            Labelled::Dry {
                worst_usd,
                is_priced,
            } => return self.dry(worst_usd, is_priced),
        };
        match &mut self.form {
            Form::Json(entries) => {
                let order = self.names.iter().enumerate();
                let order: HashMap<&str, usize> =
                    order.map(|(at, name)| (name.as_str(), at)).collect();
                entries.sort_by_key(|entry| order.get(entry.image.as_str()).copied());
                super::print(&all(&summary, entries))?;
            }
            Form::People => super::print(&totals(&summary))?,
            Form::Lines | Form::Csv => {}
        }
        if let Some(reason) = &summary.reason {
            anyhow::bail!(
                "{} of {} images are left: {reason}",
                summary.left,
                summary.total
            );
        }
        if summary.failed > 0 {
            anyhow::bail!(
                "{} of {} images have no label",
                summary.failed,
                summary.total
            );
        }
        Ok(())
    }

    fn dry(&self, worst_usd: f64, is_priced: bool) -> anyhow::Result<()> {
        let total = self.names.len();
        let all = worst_usd * total as f64;
        if !matches!(self.form, Form::People) {
            let told = json!({
                "dryRun": true,
                "total": total,
                "worstCaseUsd": all,
                "worstCaseUsdPerImage": worst_usd,
            });
            return super::print(&told.to_string());
        }
        let note = match is_priced {
            true => "",
            false => " (no model is set, so at the price of the dearest; --model names one)",
        };
        super::print(&format!(
            "{total} images, at most ${all:.2} in all, ${worst_usd:.4} for each{note}"
        ))
    }
}

fn all(summary: &Summary, entries: &[Entry]) -> String {
    let mut told = serde_json::to_value(summary).expect("plain data serialises");
    told["results"] = json!(entries);
    format!("{told:#}")
}

fn totals(summary: &Summary) -> String {
    let mut text = format!(
        "{} of {} labelled, {} failed, ${:.4}",
        summary.success, summary.total, summary.failed, summary.usage.cost_usd
    );
    if summary.cached > 0 {
        text.push_str(&format!(", {} known from before", summary.cached));
    }
    if summary.captions_kept > 0 {
        text.push_str(&format!(
            "; {} captions were left as they are, since they are not greenroom's: --replace-captions \
             replaces them",
            summary.captions_kept
        ));
    }
    if summary.interrupted > 0 {
        text.push_str(&format!(
            "; {} were asked about when it was killed and may have been paid: --retry-failed asks \
             again",
            summary.interrupted
        ));
    }
    text
}

fn for_people(entry: &Entry) -> String {
    let line = match &entry.outcome {
        Outcome::Labelled { label, .. } => format!(
            "{}  {}  {} [{}]",
            entry.image,
            label.nsfw_rating.as_str(),
            label.description,
            label.tags.join(", ")
        ),
        Outcome::Failed(failed) => format!("{}  failed: {}", entry.image, failed.message),
    };
    telemetry::printable(&line)
}

/// By RFC 4180, but for the line ends.
fn as_csv(entry: &Entry) -> String {
    let cells = match &entry.outcome {
        Outcome::Labelled { label, cached } => [
            csv_text(&entry.image),
            "success".to_owned(),
            label.nsfw_rating.as_str().to_owned(),
            csv_text(&label.description),
            csv_text(&label.tags.join(", ")),
            csv_text(&label.model),
            cached.to_string(),
            format!("{:.6}", label.usage.cost_usd),
            label.duration_ms.to_string(),
            String::new(),
            String::new(),
        ],
        Outcome::Failed(failed) => [
            csv_text(&entry.image),
            "error".to_owned(),
            String::new(),
            String::new(),
            String::new(),
            String::new(),
            false.to_string(),
            format!("{:.6}", failed.usage.cost_usd),
            String::new(),
            failed.code.as_str().to_owned(),
            csv_text(&failed.message),
        ],
    };
    cells.join(",")
}

/// `[#####·····] 120/200  14.2/min  $0.42  5:38 left  2 failed`.
fn bar(progress: &Progress) -> String {
    let mut text = format!(
        "{} {}/{}  {:.1}/min  ${:.4}",
        gauge(progress.done as u64, progress.total as u64),
        progress.done,
        progress.total,
        progress.per_minute,
        progress.cost_usd
    );
    if let Some(left) = progress.remaining_ms {
        text.push_str(&format!("  {} left", clock(left / 1000)));
    }
    if progress.failed > 0 {
        text.push_str(&format!("  {} failed", progress.failed));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_folders_and_patterns_each_once() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        fs::create_dir_all(at("a/b/.hidden")).unwrap();
        for name in [
            "a/2.JPG",
            "a/1.png",
            "a/b/3.webp",
            "a/b/.hidden/4.png",
            "a/.5.png",
            "a/notes.txt",
        ] {
            fs::write(at(name), "x").unwrap();
        }
        std::os::unix::fs::symlink(at("a"), at("a/b/loop")).unwrap();
        let names = |paths: &[&str]| -> Vec<String> {
            let paths: Vec<PathBuf> = paths.iter().map(|path| at(path)).collect();
            let images = find(&paths, true).unwrap();
            images
                .iter()
                .map(|image| {
                    let name = Path::new(&image.name).strip_prefix(folder.path()).unwrap();
                    assert_eq!(image.caption, Some(image.path.with_extension("txt")));
                    name.to_str().unwrap().to_owned()
                })
                .collect()
        };
        assert_eq!(names(&["a"]), ["a/1.png", "a/2.JPG", "a/b/3.webp"]);
        assert_eq!(
            names(&["a/b", "a/**/*.webp", "a/1.png"]),
            ["a/b/3.webp", "a/1.png"]
        );
        // Who names a file means it, but for its caption.
        let notes = find(&[at("a/notes.txt")], false).unwrap();
        assert_eq!(notes[0].path, at("a/notes.txt"));
        for none in ["a/none.png", "a/*.none"] {
            assert!(find(&[at(none)], false).is_err(), "{none}");
        }
    }

    #[test]
    fn a_caption_takes_no_image_s_place_and_no_other_caption_s() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        fs::create_dir_all(at("e")).unwrap();
        for name in ["e/x.png", "e/x.jpg", "e/y.png", "pic.txt", "pic.png"] {
            fs::write(at(name), "x").unwrap();
        }
        std::os::unix::fs::symlink(at("e"), at("link")).unwrap();
        let said = |paths: &[&str]| {
            let paths: Vec<PathBuf> = paths.iter().map(|path| at(path)).collect();
            assert!(find(&paths, false).is_ok());
            let error = find(&paths, true).unwrap_err();
            assert!(error.is::<Usage>());
            error.to_string()
        };
        let itself = said(&["pic.txt"]);
        assert!(itself.contains("is that image itself"), "{itself}");
        let other = said(&["pic.png", "pic.txt"]);
        assert!(other.contains("pic.png and is itself an image"), "{other}");
        let twice = said(&["e"]);
        assert!(
            twice.contains("x.jpg and of ") && twice.contains("x.png;"),
            "{twice}"
        );
        assert!(said(&["e/x.png", "link/x.jpg"]).contains("x.jpg"));
        assert!(find(&[at("e/y.png"), at("pic.png")], true).is_ok());
    }

    #[test]
    fn names_that_are_no_text_stay_apart() {
        let name = |bytes: &[u8]| name_of(Path::new(std::ffi::OsStr::from_bytes(bytes)));
        let names = [
            (&b"a/n.jpg"[..], "a/n.jpg"),
            (b"a\\n.jpg", "a\\n.jpg"),
            (b"n\xff.jpg", "n\\xff.jpg"),
            (b"n\xfe.jpg", "n\\xfe.jpg"),
            (b"n\\xff.jpg", "n\\\\xff.jpg"),
            (b"\\n\xff.jpg", "\\\\n\\xff.jpg"),
        ];
        for (bytes, text) in names {
            assert_eq!(name(bytes), text);
        }
        let folder = tempfile::tempdir().unwrap();
        for bytes in [&b"n\xff.jpg"[..], b"n\xfe.jpg"] {
            let file = folder.path().join(std::ffi::OsStr::from_bytes(bytes));
            fs::write(file, "x").unwrap();
        }
        let images = find(&[folder.path().to_owned()], true).unwrap();
        assert_ne!(images[0].name, images[1].name);
    }

    #[test]
    fn how_far_it_is_fits_a_line() {
        let progress = Progress {
            total: 200,
            done: 120,
            failed: 2,
            per_minute: 14.23,
            cost_usd: 0.42,
            remaining_ms: Some(338_000),
            ..Progress::default()
        };
        assert_eq!(
            bar(&progress),
            "[##############··········] 120/200  14.2/min  $0.4200  5:38 left  2 failed"
        );
    }
}
