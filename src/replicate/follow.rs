//! Following a prediction to its end: its state and its log as they come, and ending it.

use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{Prediction, Replicate, ReplicateError, Status};
use crate::text;

/// Between looks: a quick model is done within the first ones, a slow one is not asked for often.
const FIRST_PAUSE: Duration = Duration::from_millis(250);
const LONGEST_PAUSE: Duration = Duration::from_secs(3);
/// How long it is followed on without an answer: it works, and is paid, all the same.
const PATIENCE: Duration = Duration::from_secs(300);
/// What Replicate may take to end one that was cancelled.
const ENDING: Duration = Duration::from_secs(15);
/// Longest line of a log.
const MAX_LINE: usize = 2000;

/// What is new of a prediction.
#[derive(Debug, Clone, PartialEq)]
pub enum News {
    Status(Status),
    /// A line of the model's log, fit to be printed.
    Log(String),
    /// How much is done, from the log: 0 to 100.
    Percent(u8),
    /// Replicate does not answer at the moment; it is asked on.
    Silent,
    /// It is being ended.
    Ending,
}

impl Replicate {
    /// Follows it to success. Where `stop` is cancelled or the time is over it is cancelled; one that
    /// succeeded meanwhile is a success.
    ///
    /// # Errors
    /// [`ReplicateError::Failed`], [`ReplicateError::Cancelled`], [`ReplicateError::TimedOut`], and
    /// whatever keeps us from knowing.
    pub async fn follow(
        &self,
        mut prediction: Prediction,
        limit: Duration,
        stop: &CancellationToken,
        mut tell: impl FnMut(News),
    ) -> Result<Prediction, ReplicateError> {
        let until = Instant::now() + limit;
        let mut log = Log::default();
        let mut told = None;
        let mut pause = FIRST_PAUSE;
        let mut answered = Instant::now();
        loop {
            if told != Some(prediction.status) {
                told = Some(prediction.status);
                tell(News::Status(prediction.status));
            }
            log.read(&prediction, &mut tell);
            if prediction.status.is_final() {
                return ended(prediction);
            }
            tokio::select! {
                biased;
                () = stop.cancelled() => {
                    return self.end(&prediction.id, &mut log, &mut tell, ReplicateError::Cancelled {
                        id: prediction.id.clone(),
                    }).await;
                }
                () = tokio::time::sleep_until(until) => {
                    return self.end(&prediction.id, &mut log, &mut tell, ReplicateError::TimedOut {
                        id: prediction.id.clone(),
                        seconds: limit.as_secs(),
                    }).await;
                }
                () = tokio::time::sleep(pause) => {}
            }
            pause = (pause * 3 / 2).min(LONGEST_PAUSE);
            let asked = tokio::select! {
                biased;
                () = stop.cancelled() => continue,
                asked = self.prediction(&prediction.id) => asked,
            };
            match asked {
                Ok(found) => {
                    answered = Instant::now();
                    prediction = found;
                }
                Err(error) if error.is_passing() && answered.elapsed() < PATIENCE => {
                    tell(News::Silent);
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Ends it, and waits for its end: it may have succeeded just before.
    async fn end(
        &self,
        id: &str,
        log: &mut Log,
        tell: &mut impl FnMut(News),
        why: ReplicateError,
    ) -> Result<Prediction, ReplicateError> {
        tell(News::Ending);
        if let Err(source) = self.cancel(id).await {
            // Somebody else may have ended it, or it itself.
            match self.prediction(id).await {
                Ok(found) if found.status.is_final() => {}
                _ => {
                    return Err(ReplicateError::NotCancelled {
                        id: id.to_owned(),
                        source: Box::new(source),
                    });
                }
            }
        }
        let until = Instant::now() + ENDING;
        while Instant::now() < until {
            if let Ok(found) = self.prediction(id).await
                && found.status.is_final()
            {
                log.read(&found, tell);
                tell(News::Status(found.status));
                return match found.status {
                    Status::Succeeded => Ok(found),
                    _ => Err(why),
                };
            }
            tokio::time::sleep(FIRST_PAUSE).await;
        }
        Err(why)
    }
}

fn ended(prediction: Prediction) -> Result<Prediction, ReplicateError> {
    let id = prediction.id.clone();
    match prediction.status {
        Status::Succeeded => Ok(prediction),
        // By its deadline at Replicate, or by somebody on its page.
        Status::Canceled => Err(ReplicateError::Cancelled { id }),
        _ => Err(ReplicateError::Failed {
            id,
            error: prediction
                .error
                .filter(|error| !error.is_empty())
                .unwrap_or_else(|| "the model says no more; its log may".to_owned()),
        }),
    }
}

/// What of a growing log was told.
#[derive(Debug, Default)]
struct Log {
    told: String,
    percent: Option<u8>,
}

impl Log {
    /// Tells whole lines that are new; at the end the last one too.
    fn read(&mut self, prediction: &Prediction, tell: &mut impl FnMut(News)) {
        // Of a long log Replicate may keep the end alone.
        let new = match prediction.logs.strip_prefix(&self.told) {
            Some(new) => new,
            None => prediction.logs.as_str(),
        };
        let end = match prediction.status.is_final() {
            true => new.len(),
            // A progress bar writes itself anew after `\r`.
            false => new.rfind(['\n', '\r']).map_or(0, |at| at + 1),
        };
        let (new, later) = new.split_at(end);
        for line in new.split(['\n', '\r']) {
            let line = text::plain(text::cut(line, MAX_LINE));
            if line.trim().is_empty() {
                continue;
            }
            match percent(&line) {
                Some(done) => {
                    if self.percent != Some(done) {
                        self.percent = Some(done);
                        tell(News::Percent(done));
                    }
                }
                None => tell(News::Log(line.trim_end().to_owned())),
            }
        }
        let told = prediction.logs.len() - later.len();
        prediction.logs[..told].clone_into(&mut self.told);
    }
}

/// `45%|████▌     | 9/20 [00:01<00:01,  8.1it/s]`, as tqdm writes it.
fn percent(line: &str) -> Option<u8> {
    let (before, rest) = line.split_once('%')?;
    let number = before.rsplit(|c: char| !c.is_ascii_digit()).next()?;
    rest.trim_start().strip_prefix('|')?;
    number.parse().ok().filter(|done| *done <= 100)
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;
    use crate::replicate::Measured;

    fn with(status: Status, logs: &str) -> Prediction {
        Prediction {
            id: "a".to_owned(),
            status,
            output: Value::Null,
            logs: logs.to_owned(),
            error: None,
            measured: Measured::default(),
        }
    }

    #[test]
    fn each_line_of_a_log_is_told_once() {
        let mut log = Log::default();
        let mut news = Vec::new();
        let mut tell = |one| news.push(one);
        log.read(&with(Status::Starting, ""), &mut tell);
        log.read(&with(Status::Processing, "seed: 4\nload"), &mut tell);
        log.read(
            &with(Status::Processing, "seed: 4\nloading\n  0%|  | 0/4\r"),
            &mut tell,
        );
        let more = "seed: 4\nloading\n  0%|  | 0/4\r 50%|## | 2/4\r\u{1b}[31mred\u{1b}[0m\nthe en";
        log.read(&with(Status::Processing, more), &mut tell);
        log.read(&with(Status::Succeeded, &format!("{more}d")), &mut tell);
        // Only the end of it was kept.
        log.read(&with(Status::Succeeded, "another\n"), &mut tell);
        let line = |text: &str| News::Log(text.to_owned());
        assert_eq!(
            news,
            [
                line("seed: 4"),
                line("loading"),
                News::Percent(0),
                News::Percent(50),
                line("red"),
                line("the end"),
                line("another"),
            ]
        );
    }

    #[test]
    fn a_percentage_in_words_is_no_progress_bar() {
        assert_eq!(percent(" 45%|████▌     | 9/20 [00:01<00:01]"), Some(45));
        assert_eq!(percent("Steps: 100%|#| 4/4"), Some(100));
        assert_eq!(percent("kept 45% of it"), None);
        assert_eq!(percent("945%|#| 9/1"), None);
    }
}
