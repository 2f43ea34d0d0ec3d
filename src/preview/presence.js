// Says that a person has this page before them: while it is visible, now and every 30 s.
(() => {
  const say = () => {
    if (document.visibilityState === "visible") {
      fetch("/__greenroom/presence", { method: "POST", keepalive: true }).catch(() => {});
    }
  };
  document.addEventListener("visibilitychange", say);
  setInterval(say, 30000);
  say();
})();
