// Says that a person has this page before them: while it is visible, now and every 30 s. A page
// that should hear of changes and has been deaf for a while is loaded again, once a minute at most.
// An empty one, as it is served while its file is being written, holds nothing that hears of changes: it
// is asked for until there is something in it.
(() => {
  const hears = document.querySelector('script[src*="/@vite/client"]') ? "1" : "0";
  const again = () => {
    const last = Number(sessionStorage.getItem("greenroom-loaded-again") ?? 0);
    if (Date.now() - last < 60000) return;
    sessionStorage.setItem("greenroom-loaded-again", String(Date.now()));
    location.reload();
  };
  const say = () => {
    if (document.visibilityState === "visible") {
      fetch("/__greenroom/presence", {
        method: "POST",
        keepalive: true,
        headers: { "x-greenroom-hears": hears },
      })
        .then((answer) => answer.status === 205 && again())
        .catch(() => {});
    }
  };
  document.addEventListener("visibilitychange", say);
  setInterval(say, 30000);
  say();

  const isOurs = (node) => node.getAttribute("src")?.startsWith("/__greenroom/");
  const { head, body } = document;
  if (![...head.children, ...body.children].every(isOurs) || body.textContent.trim() !== "") return;
  let wait = 250;
  const look = async () => {
    try {
      if (document.visibilityState === "visible") {
        const answer = await fetch(location.href, { cache: "no-store" });
        if ((await answer.text()).trim() !== "") return location.reload();
      }
    } catch {
      // The connection is away for a moment: ask again.
    }
    wait = Math.min(wait * 1.5, 5000);
    setTimeout(look, wait);
  };
  setTimeout(look, wait);
})();
