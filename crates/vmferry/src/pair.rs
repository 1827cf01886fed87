//! `pair`, `peers`, `unpair`, and pairing over ssh.

use std::time::{Duration, UNIX_EPOCH};

use tokio::process::Command;
use vmferry_api::client::Client;
use vmferry_api::{PairRequest, PeerView, PeersView, TokenRequest, TokenView};

use crate::failure::Failure;
use crate::vms::{print_json, print_table};

/// How long a token that goes over ssh is good for.
const SSH_TOKEN: &str = "60s";
/// How long an agent that was started over ssh may take to answer.
const AGENT_START: Duration = Duration::from_secs(10);
/// What the command line ends with when no agent answers.
const NO_AGENT: i32 = 7;

pub(crate) async fn make_token(client: &Client, expires: Duration, quiet: bool) -> Result<(), Failure> {
    let request = TokenRequest { seconds: expires.as_secs_f64().ceil() as u64 };
    let made: TokenView = client.post("/v1/tokens", &request).await?;
    if quiet {
        println!("{}", made.token);
        return Ok(());
    }
    let time = humantime::format_duration(Duration::from_secs(made.seconds));
    eprintln!("On the other host, within {time}, and once:\n");
    println!("vmferry pair {}", made.token);
    Ok(())
}

pub(crate) async fn use_token(client: &Client, token: String) -> Result<(), Failure> {
    let token =
        if token == "-" { std::io::read_to_string(std::io::stdin()).map_err(Failure::Terminal)? } else { token };
    let peer: PeerView = client.post("/v1/peers", &PairRequest { token, host: None }).await?;
    println!("paired with {} at {}", peer.name, peer.address);
    Ok(())
}

pub(crate) async fn list(client: &Client, json: bool) -> Result<(), Failure> {
    let view: PeersView = client.get("/v1/peers").await?;
    if json {
        print_json(&view);
        return Ok(());
    }
    println!("this host is {}, {}\n", view.name, view.fingerprint);
    if view.peers.is_empty() {
        println!("no peers yet: `vmferry pair` here makes a token for `vmferry pair TOKEN` on another host");
        return Ok(());
    }
    let rows = view.peers.iter().map(|peer| {
        let paired = humantime::format_rfc3339_seconds(UNIX_EPOCH + Duration::from_secs(peer.paired)).to_string();
        let address = if peer.address.is_empty() { "listens nowhere" } else { &peer.address };
        [peer.name.clone(), address.to_owned(), paired, peer.fingerprint.clone()]
    });
    print_table(["NAME", "ADDRESS", "PAIRED", "FINGERPRINT"], rows);
    Ok(())
}

pub(crate) async fn unpair(client: &Client, peer: &str) -> Result<(), Failure> {
    // Names and fingerprints have no characters that mean something in a path; others are no peers either way.
    let safe: String =
        peer.chars().map(|c| if c.is_ascii_alphanumeric() || "._-".contains(c) { c } else { '_' }).collect();
    client.delete(&format!("/v1/peers/{safe}")).await?;
    println!("{peer} is not trusted any more; there, `vmferry unpair` this host too");
    Ok(())
}

/// Where ssh goes: `ssh://[USER@]HOST[:PORT]`.
#[derive(Debug, PartialEq, Eq)]
struct SshHost {
    /// `USER@HOST` or `HOST`, as ssh takes it.
    target: String,
    host: String,
    port: Option<u16>,
}

impl SshHost {
    fn parse(rest: &str) -> Option<Self> {
        let rest = rest.trim_end_matches('/');
        let (user, place) = rest.rsplit_once('@').map_or((None, rest), |(user, place)| (Some(user), place));
        let (host, port) = match place.strip_prefix('[') {
            // IPv6 stands in brackets, as in any URL.
            Some(inner) => {
                let (host, after) = inner.split_once(']')?;
                let port = match after.strip_prefix(':') {
                    Some(port) => Some(port),
                    None if after.is_empty() => None,
                    None => return None,
                };
                (host, port)
            }
            None => match place.split_once(':') {
                Some((host, port)) => (host, Some(port)),
                None => (place, None),
            },
        };
        // A name that begins with a dash would be an option to ssh.
        let fits = |word: &str, more: &str| {
            let allowed = |c: char| c.is_ascii_alphanumeric() || more.contains(c);
            !word.is_empty() && !word.starts_with('-') && word.chars().all(allowed)
        };
        if !fits(host, "._-:") || user.is_some_and(|user| !fits(user, "._-")) {
            return None;
        }
        let port = port.map(|port| port.parse().ok()).map_or(Some(None), |port| port.map(Some))?;
        let target = user.map_or_else(|| host.to_owned(), |user| format!("{user}@{host}"));
        Some(Self { target, host: host.into(), port })
    }

    /// Runs a command of the remote shell; what it printed, and how it ended.
    async fn run(&self, command: &str) -> Result<(String, Option<i32>), Failure> {
        let mut ssh = Command::new("ssh");
        if let Some(port) = self.port {
            ssh.args(["-p", &port.to_string()]);
        }
        // It may ask for a passphrase on the terminal; its own words go there too.
        let output = ssh.args([&self.target, "--", command]).stderr(std::process::Stdio::inherit()).output().await;
        let output = output.map_err(Failure::Ssh)?;
        Ok((String::from_utf8_lossy(&output.stdout).trim().to_owned(), output.status.code()))
    }
}

/// `--to ssh://...`: the trust that ssh has in the other host, and it in us, makes the two agents peers. ssh carries a
/// join token and nothing else. Gives the peer's name; any other destination stays as it is.
pub(crate) async fn over_ssh(client: &Client, to: String) -> Result<String, Failure> {
    let Some(rest) = to.strip_prefix("ssh://") else { return Ok(to) };
    let there = SshHost::parse(rest).ok_or_else(|| Failure::BadSshHost(to.clone()))?;
    let make_token = format!("vmferry pair --quiet --expires {SSH_TOKEN}");
    let (mut token, mut code) = there.run(&make_token).await?;
    if code == Some(NO_AGENT) {
        eprintln!("no agent answers on {}: starting one", there.host);
        // It must outlive ssh. What it logs from now on is in its own file.
        let start = "log=${XDG_STATE_HOME:-$HOME/.local/state}; [ \"$(id -u)\" = 0 ] && log=/var/log; \
                     mkdir -p \"$log\"; setsid vmferry agent </dev/null >>\"$log/vmferry-agent.log\" 2>&1 &";
        there.run(start).await?;
        let deadline = std::time::Instant::now() + AGENT_START;
        while code == Some(NO_AGENT) && std::time::Instant::now() < deadline {
            tokio::time::sleep(Duration::from_millis(300)).await;
            (token, code) = there.run(&make_token).await?;
        }
    }
    if code != Some(0) {
        return Err(Failure::NoTokenOverSsh { host: there.host, code });
    }
    let request = PairRequest { token, host: Some(there.host) };
    let peer: PeerView = client.post("/v1/peers", &request).await?;
    Ok(peer.name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ssh(target: &str, host: &str, port: Option<u16>) -> SshHost {
        SshHost { target: target.into(), host: host.into(), port }
    }

    #[test]
    fn an_ssh_destination_is_read_as_a_url() {
        assert_eq!(SshHost::parse("beta"), Some(ssh("beta", "beta", None)));
        assert_eq!(
            SshHost::parse("root@beta.example.org:2222/"),
            Some(ssh("root@beta.example.org", "beta.example.org", Some(2222)))
        );
        assert_eq!(SshHost::parse("root@[2001:db8::1]:22"), Some(ssh("root@2001:db8::1", "2001:db8::1", Some(22))));
        assert_eq!(SshHost::parse("[::1]"), Some(ssh("::1", "::1", None)));
    }

    #[test]
    fn what_ssh_or_a_shell_would_take_for_something_else_is_refused() {
        for bad in [
            "",
            "-oProxyCommand=x",
            "root@-x",
            "-l@beta",
            "beta;id",
            "beta:x",
            "beta:99999",
            "a b",
            "$(id)@b",
            "[::1",
            "@b",
        ] {
            assert_eq!(SshHost::parse(bad), None, "{bad}");
        }
    }
}
