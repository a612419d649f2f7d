//! `esker` as a process of its own: killed when the test ends, however it ends.

use std::net::TcpListener;
use std::path::Path;
use std::process::{ExitStatus, Stdio};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, BufReader, Lines};
use tokio::process::{Child, ChildStdout, Command};
use tokio::task::JoinHandle;
use tokio::time::timeout;

/// How long a command, or the start of a server, may take on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// The bytes of a server's log that are kept in memory. The rest is read and dropped.
const MAX_LOG_BYTES: usize = 1 << 20;

/// A loopback address that no process listens on. Another process could take it before it is used.
/// But the system hands out ports in turn, so that does not happen soon.
pub fn free_address() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").expect("loopback has a free port");
    listener.local_addr().expect("it is bound").to_string()
}

fn command(arguments: &[&str]) -> Command {
    program_with(env!("CARGO_BIN_EXE_esker"), arguments)
}

fn program_with(program: &str, arguments: &[&str]) -> Command {
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.env_remove("ESKER_PLACEMENT").kill_on_drop(true);
    command
}

/// A server that runs until it is killed.
pub struct Process {
    child: Child,
    output: Lines<BufReader<ChildStdout>>,
    log: Arc<Mutex<String>>,
    reader: JoinHandle<()>,
}

impl Process {
    pub fn spawn(arguments: &[&str]) -> Self {
        Process::started(&mut command(arguments))
    }

    /// Like `spawn`, with limits of open files, as `ulimit` takes them.
    pub fn spawn_limited(ulimit: &str, arguments: &[&str]) -> Self {
        let script = format!("ulimit {ulimit} && exec \"$0\" \"$@\"");
        let program = env!("CARGO_BIN_EXE_esker");
        let arguments = [&["-c", &script, program], arguments].concat();
        Process::started(&mut program_with("sh", &arguments))
    }

    fn started(command: &mut Command) -> Self {
        // The log is the one that an operator sees, whatever `ESKER_LOG` is here.
        let mut child = command
            .env("ESKER_LOG", "info")
            .spawn()
            .expect("the program that was built for this test starts");
        let output = child.stdout.take().expect("it is piped");
        let errors = child.stderr.take().expect("it is piped");
        let log = Arc::new(Mutex::new(String::new()));
        let reader = tokio::spawn(keep_reading(errors, Arc::clone(&log)));
        Process { child, output: BufReader::new(output).lines(), log, reader }
    }

    /// `esker start`, as one of the members in `join` or as another node.
    pub fn node(data_dir: &Path, listen: &str, join: &[String]) -> Self {
        Process::node_with(data_dir, listen, join, &[])
    }

    /// Like `node`, with more arguments.
    pub fn node_with(data_dir: &Path, listen: &str, join: &[String], more: &[&str]) -> Self {
        let data_dir = data_dir.to_str().expect("a temporary directory has a plain name");
        let join = join.join(",");
        let mut arguments =
            vec!["start", "--data-dir", data_dir, "--listen", listen, "--join", &join];
        arguments.extend(more);
        Process::spawn(&arguments)
    }

    /// Starts `esker playground` and waits until it is ready. Returns the process and the address
    /// of its placement driver.
    pub async fn playground(data_dir: &Path) -> (Self, String) {
        let data_dir = data_dir.to_str().expect("a temporary directory has a plain name");
        let mut process = Process::spawn(&["playground", "--data-dir", data_dir, "--port", "0"]);
        let placement = process.line_after("ready: placement at ").await;
        (process, placement)
    }

    /// The rest of the first line of standard output that begins with `prefix`.
    pub async fn line_after(&mut self, prefix: &str) -> String {
        let found = async {
            while let Some(line) = self.output.next_line().await.expect("the output is text") {
                if let Some(rest) = line.strip_prefix(prefix) {
                    return Some(rest.to_owned());
                }
            }
            None
        };
        match timeout(PATIENCE, found).await {
            Ok(Some(rest)) => rest,
            Ok(None) => panic!("it ended before it said `{prefix}`: {}", self.log()),
            Err(_) => panic!("no `{prefix}` within {PATIENCE:?}: {}", self.log()),
        }
    }

    /// The process's standard error so far.
    pub fn log(&self) -> String {
        self.log.lock().clone()
    }

    /// Sends SIGKILL: nothing is flushed or closed.
    pub async fn kill(mut self) {
        self.child.start_kill().expect("it is still running");
        timeout(PATIENCE, self.child.wait())
            .await
            .expect("a killed process ends")
            .expect("it is our child");
        self.reader.abort();
    }

    /// Waits until the process ends by itself. Returns its exit status and its standard error.
    pub async fn ended(mut self) -> (ExitStatus, String) {
        let ended = timeout(PATIENCE, self.child.wait()).await;
        let status = ended.unwrap_or_else(|_| panic!("it goes on: {}", self.log()));
        // The reader ends with the pipe.
        let _ = (&mut self.reader).await;
        (status.expect("it is our child"), self.log())
    }

    /// Sends SIGTERM, and waits until the process has ended with success.
    pub async fn terminate(self) {
        let log = Arc::clone(&self.log);
        let status = self.end_by("TERM").await;
        assert_eq!(status, Some(0), "{}", log.lock());
    }

    /// Sends SIGSTOP. The process does nothing from now on, but its sockets stay open, and the
    /// system accepts connections for it.
    pub async fn freeze(&self) {
        self.signal("STOP").await;
    }

    /// Sends SIGCONT. The process goes on as if nothing had happened.
    pub async fn thaw(&self) {
        self.signal("CONT").await;
    }

    async fn signal(&self, signal: &str) {
        let id = self.child.id().expect("it has not ended").to_string();
        let sent = Command::new("kill").args(["-s", signal, &id]).status().await;
        assert!(sent.expect("there is a `kill`").success(), "{signal} was not sent to {id}");
    }

    /// Sends a signal by name, and waits until the process ends. Returns its exit status, or `None`
    /// if the signal ended it.
    pub async fn end_by(mut self, signal: &str) -> Option<i32> {
        self.signal(signal).await;
        let status = timeout(PATIENCE, self.child.wait()).await;
        let status = status.unwrap_or_else(|_| panic!("{signal} did not end it: {}", self.log()));
        status.expect("it is our child").code()
    }

    /// Whether the process still runs.
    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().expect("it is our child").is_none()
    }
}

async fn keep_reading(errors: impl AsyncRead + Unpin, log: Arc<Mutex<String>>) {
    let mut lines = BufReader::new(errors).lines();
    while let Ok(Some(line)) = lines.next_line().await {
        let mut log = log.lock();
        if log.len() < MAX_LOG_BYTES {
            log.push_str(&line);
            log.push('\n');
        }
    }
}

/// The result of a command.
#[derive(Debug)]
pub struct Finished {
    pub status: ExitStatus,
    pub output: String,
    pub errors: String,
}

/// Runs a command to its end.
pub async fn run(arguments: &[&str]) -> Finished {
    run_with(arguments, &[]).await
}

/// Like `run`, with environment variables.
pub async fn run_with(arguments: &[&str], variables: &[(&str, &str)]) -> Finished {
    let mut child = command(arguments)
        // The message at the end is under test, not the log before it.
        .env("ESKER_LOG", "off")
        .envs(variables.iter().copied())
        .spawn()
        .expect("the program that was built for this test starts");
    let (mut output, mut errors) = (String::new(), String::new());
    let mut stdout = child.stdout.take().expect("it is piped");
    let mut stderr = child.stderr.take().expect("it is piped");
    let finished = async {
        let (output, errors, status) = tokio::join!(
            stdout.read_to_string(&mut output),
            stderr.read_to_string(&mut errors),
            child.wait()
        );
        output.expect("the output is text");
        errors.expect("the errors are text");
        status.expect("it is our child")
    };
    let status = timeout(PATIENCE, finished)
        .await
        .unwrap_or_else(|_| panic!("`esker {}` did not end", arguments.join(" ")));
    Finished { status, output, errors }
}
