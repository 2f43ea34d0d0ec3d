// The studio's first room: one thread's conversation with the agent, its preview beside it.
// Everything shown comes from agents, sites and people we do not know, so it reaches the page as text, never as markup.

import { describeOrStop, reportParts, stopDescribing } from './describe.js';

export {
  $, ADVICE, ApiError, ConnectionLost, announce, connectionLost, events, failure, h, keepAtBottom, loadHistory, noteTurn, plural,
  pollPreviewSoon, post, settle, shortPath, showComposer, showHint, showProblem, state, threadPath, throughOutages,
};

const state = {
  ids: null,                // {client, user, thread}
  pinned: {},               // what the service fixes; the switch dialog does not offer to change it
  phase: 'connecting',      // connecting, preparing, ready, failed
  preparingSince: 0,
  worktree: '',             // prefix to leave out of the paths in tool calls
  turns: new Map(),         // turnId → turn, oldest first
  draft: { text: '', mode: 'execute', key: null },
  sending: false,
  describing: null,         // how far the images' descriptions are, while they are made
  preview: { state: 'off', errors: [] },
  previewTimer: 0,
  reconnecting: null,       // promise that resolves when the service answers again
  tokenAsked: null,         // promise while the token dialog is open
  tokenDeclined: false,
  atBottom: true,
  hint: { text: '', until: 0, armsStop: false },
};

const ACTIVE = new Set(['queued', 'running', 'stopping']);
// A browser allows six connections to one HTTP/1.1 origin; turns run in order, so watching the first two misses nothing.
const STREAMS_AT_ONCE = 2;
const SILENCE_MS = 45_000;  // the service sends a comment every 15 s, so this much silence is a dead connection
const DEFAULT_SAMPLES = ['Change the heading to …', 'Make the accent colour teal', 'Add a page called Team'];

const $ = (id) => document.getElementById(id);
const sleep = (ms) => new Promise((done) => setTimeout(done, ms));
const backoff = (attempt) => Math.min(15_000, 500 * 2 ** attempt);

// ---------------------------------------------------------------- Text and elements

// Terminal escapes and other controls become visible signs; direction overrides and C1 controls a replacement mark.
function plain(value) {
  return String(value ?? '')
    .replace(/\r\n/g, '\n')
    .replace(/[\u0000-\u0008\u000b-\u001f]/g, (c) => String.fromCharCode(0x2400 + c.charCodeAt(0)))
    .replace(/\u007f/g, '\u2421')
    .replace(/[\u0080-\u009f\u202a-\u202e\u2066-\u2069]/g, '\ufffd');
}

function h(tag, props = {}, ...children) {
  const { data, ...rest } = props;
  const element = Object.assign(document.createElement(tag), rest);
  Object.assign(element.dataset, data);
  element.append(...children.flat().filter((c) => c != null && c !== false).map((c) => (c instanceof Node ? c : plain(c))));
  return element;
}

const clip = (text, length) => (text.length > length ? `${text.slice(0, length - 1)}…` : text);
const plural = (n, word) => `${n} ${word}${n === 1 ? '' : 's'}`;

function duration(ms) {
  const seconds = Math.max(0, Math.round(ms / 1000));
  if (ms < 1000) return `${Math.max(0, Math.round(ms))} ms`;
  return seconds < 60 ? `${seconds} s` : `${Math.floor(seconds / 60)} min ${seconds % 60} s`;
}

function money(usd) {
  return new Intl.NumberFormat(undefined, { style: 'currency', currency: 'USD', maximumFractionDigits: usd < 1 ? 4 : 2 }).format(usd);
}

function clock(time) {
  const date = new Date(time);
  const today = date.toDateString() === new Date().toDateString();
  return date.toLocaleString(undefined, today ? { timeStyle: 'short' } : { dateStyle: 'medium', timeStyle: 'short' });
}

function announce(text) {
  $('announcer').textContent = plain(text);
}

// ---------------------------------------------------------------- Calling the service

class ApiError extends Error {
  constructor(status, code, message) {
    super(message);
    Object.assign(this, { status, code });
  }
}
class ConnectionLost extends Error {}

const storedToken = () => sessionStorage.getItem('greenroom.token') ?? '';

async function request(path, { method = 'GET', body, headers = {}, signal } = {}) {
  for (;;) {
    const token = storedToken();
    const response = await fetch(path, {
      method,
      signal,
      cache: 'no-store',
      headers: {
        ...headers,
        ...(body && { 'Content-Type': 'application/json' }),
        ...(token && { Authorization: `Bearer ${token}` }),
      },
      body: body && JSON.stringify(body),
    }).catch(() => { throw connectionLost(); });
    if (response.status !== 401) return response;
    await askForToken(token);
  }
}

async function call(path, options) {
  const response = await request(path, options);
  const answer = await response.json().catch(() => null);
  if (response.ok && answer) return answer;
  throw failure(response.status, answer);
}

function failure(status, answer) {
  // A gateway in front gave up, or the service is leaving: both pass, and every call made here is safe to repeat.
  if ((!answer?.code && status >= 502) || answer?.code === 'draining') return connectionLost(answer?.error);
  return new ApiError(status, answer?.code ?? '', answer?.error ?? `The service answered ${status}.`);
}

const resultOf = (answer) => answer.result ?? answer;
const post = (path, body, headers) => call(path, { method: 'POST', body, headers });
const bodyIds = () => ({ clientId: state.ids.client, userId: state.ids.user, threadId: state.ids.thread });
const threadPath = (rest) =>
  `/api/clients/${encodeURIComponent(state.ids.client)}/users/${encodeURIComponent(state.ids.user)}/threads/${encodeURIComponent(state.ids.thread)}/${rest}`;

function connectionLost(why) {
  state.reconnecting ??= reconnect(why);
  return new ConnectionLost();
}

async function reconnect(why) {
  $('banner').textContent = plain(why ? `${why} Trying again…` : 'No connection to the service. Trying again…');
  $('banner').hidden = false;
  for (let attempt = 1; ; attempt++) {
    const online = new Promise((done) => addEventListener('online', done, { once: true }));
    await Promise.race([sleep(backoff(attempt)), online]);
    const answer = await fetch('/health', { cache: 'no-store', signal: AbortSignal.timeout(5000) }).catch(() => null);
    if (answer?.ok) break;
  }
  $('banner').hidden = true;
  state.reconnecting = null;
  if (state.phase === 'ready') catchUp();
}

async function throughOutages(job, isWanted = () => true) {
  for (;;) {
    try {
      return await job();
    } catch (error) {
      if (!(error instanceof ConnectionLost)) throw error;
      await state.reconnecting;
      if (!isWanted()) return null;
    }
  }
}

// Several calls can meet a 401 at once; they share one dialog. After "Not now" only a person's own action asks again.
async function askForToken(rejected) {
  if (storedToken() !== rejected) return;
  if (!state.tokenDeclined) {
    state.tokenAsked ??= tokenDialog(rejected).finally(() => { state.tokenAsked = null; });
    await state.tokenAsked;
  }
  if (state.tokenDeclined) throw new ApiError(401, 'unauthenticated', 'The service needs an access token.');
}

async function tokenDialog(rejected) {
  $('token-why').textContent = rejected
    ? 'The service did not accept this token. Check it and try again.'
    : 'This service is protected. The token stays in this tab and is forgotten when you close it.';
  $('token').value = '';
  const answer = await ask($('token-dialog'));
  state.tokenDeclined = answer !== 'ok';
  if (answer === 'ok') sessionStorage.setItem('greenroom.token', $('token').value.trim());
}

function ask(dialog) {
  dialog.returnValue = '';
  dialog.showModal();
  return new Promise((done) => dialog.addEventListener('close', () => done(dialog.returnValue), { once: true }));
}

// ---------------------------------------------------------------- Turns: what is on the page

const KINDS = { undo: 'Undo', redo: 'Redo', restore: 'Restore', sync: 'Sync', 'alt-text': 'Images described', images: 'Images', recovered: 'Recovered edits', outside: 'Outside edits' };
const OPERATIONS = new Set(['undo', 'redo', 'restore', 'sync']);
const STATUS = {
  queued: 'In line', running: 'Working', stopping: 'Stopping', completed: 'Done', failed: 'Failed',
  cancelled: 'Stopped', recovered: 'Recovered', unknown: 'Unknown',
};
const ADVICE = {
  turn_timeout: 'It ran out of time. What it had changed is kept; ask for a smaller step, or say "go on".',
  budget_exceeded: 'The budget for this is used up. Whoever runs the service can raise it.',
  agent_failed: 'What it had changed is kept. Send it again; if it keeps failing, the service’s log says why.',
  circuit_open: 'The model does not answer well at the moment. Wait a minute and send it again.',
  queue_full: 'Too many instructions are waiting. Let some finish, then send it again.',
  rate_limited: 'Wait a little and send it again.',
  thread_busy_elsewhere: 'Another container works on this thread. Try again when it has finished, or switch to another thread.',
  insufficient_storage: 'The disk is full. Whoever runs the service has to make room.',
  not_this_tenant: 'This service belongs to another client or user. Switch to the one it serves.',
  invalid_id: 'Use "Switch" at the top to choose other names.',
  clone_failed: 'Check the repository’s address and that the service may read it.',
  install_failed: 'The site’s dependencies could not be installed. Check its package.json and lockfile.',
  undo_conflict: 'Undo those later turns first, or ask the agent to change it.',
};
const TOOLS = {
  Read: ['Reading', 'Read', 'file_path'], Edit: ['Editing', 'Edited', 'file_path'], Write: ['Writing', 'Wrote', 'file_path'],
  Bash: ['Running', 'Ran', 'command'], Glob: ['Finding', 'Found', 'pattern'], Grep: ['Searching for', 'Searched for', 'pattern'],
};

/** Adds a turn, or learns more about one already here (a later history knows more than an earlier one). */
function noteTurn(facts, after = $('turns').lastElementChild) {
  let turn = state.turns.get(facts.turnId);
  if (turn) {
    if (!turn.following && !turn.settled) update(turn, facts);
    else if (facts.undoneBy !== turn.undoneBy && !ACTIVE.has(turn.status)) {
      turn.undoneBy = facts.undoneBy;     // the one thing about a turn that changes after its end
      showFoot(turn);
    }
    return turn;
  }
  turn = { id: facts.turnId, status: 'queued', lastEventId: '', following: false, settled: false, steps: new Map(), files: new Map() };
  turn.parts = {
    meta: h('p', { className: 'meta' }), log: h('div', { className: 'log' }),
    outcome: h('div', {}), foot: h('p', { className: 'foot' }), status: h('span', { className: 'status' }), facts: h('span', {}), actions: h('span', {}),
  };
  turn.parts.foot.append(turn.parts.status, turn.parts.facts, turn.parts.actions);
  turn.element = h('li', { className: 'turn', tabIndex: -1 },
    h('p', { className: 'said' }, facts.instruction || KINDS[facts.kind] || '(no instruction)'),
    turn.parts.meta, turn.parts.log, turn.parts.outcome, turn.parts.foot);
  if (after) after.after(turn.element);
  else $('turns').prepend(turn.element);
  state.turns.set(turn.id, turn);
  $('empty').hidden = true;
  update(turn, facts);
  return turn;
}

function update(turn, facts) {
  Object.assign(turn, { ...facts, status: facts.status ?? turn.status });
  turn.startedAt &&= +new Date(turn.startedAt);
  const { kind, mode, author, startedAt } = turn;
  const label = kind === 'plan' || mode === 'plan' ? 'Plan only' : KINDS[kind] ?? (['execute', 'turn', undefined].includes(kind) ? null : kind);
  turn.parts.meta.replaceChildren(...[
    label && h('span', { className: 'kind' }, label),
    author?.name && h('span', {}, author.name),
    startedAt && h('time', { dateTime: new Date(startedAt).toISOString() }, clock(startedAt)),
  ].filter(Boolean));
  if (!ACTIVE.has(turn.status)) showOutcome(turn);
  showFoot(turn);
}

function showFoot(turn) {
  const active = ACTIVE.has(turn.status);
  const { commit, usage, durationMs, continuity } = turn;
  const facts = active ? [] : [
    durationMs != null && duration(durationMs),
    commit && `commit ${String(commit.id ?? commit).slice(0, 7)}`,
    usage?.costUsd != null && money(usage.costUsd),
    continuity === 'replayed' && 'continued from a summary',
    turn.undoneBy && 'undone',
  ].filter(Boolean);
  turn.element.dataset.status = turn.status;
  turn.parts.facts.textContent = plain(facts.join(' · '));
  showActions(turn);
  showStatus(turn);
  showComposer();
}

function showStatus(turn) {
  const working = turn.status === 'running' && turn.startedAt;
  const elapsed = working ? ` ${duration(Math.max(1000, Date.now() - turn.startedAt))}` : '';
  turn.parts.status.textContent = plain([(STATUS[turn.status] ?? turn.status) + elapsed, turn.note].filter(Boolean).join(' · '));
}

function showActions(turn) {
  const { status, parts } = turn;
  const isOver = !ACTIVE.has(status);
  const actions = [
    status === 'queued' && ['Remove from the line', () => cancel(turn)],
    isOver && !turn.settled && (!KINDS[turn.kind] || turn.kind === 'alt-text') && ['Show what it did', () => replay(turn)],
    isOver && turn.commit && !OPERATIONS.has(turn.kind) && (turn.undoneBy
      ? ['Bring back', () => takeBack(turn, 'redo', 'It is there again.')]
      : ['Undo', () => takeBack(turn, 'undo', 'Its changes are taken back.')]),
    ['failed', 'cancelled'].includes(status) && turn.instruction && ['Put back in the box', () => fillBox(turn.instruction)],
  ].filter(Boolean);
  // Buttons that stay are not made anew, and one that goes hands its focus to the turn: a keyboard keeps its place.
  if (parts.actions.textContent === actions.map(([label]) => label).join('')) return;
  if (parts.actions.contains(document.activeElement)) turn.element.focus();
  parts.actions.replaceChildren(...actions.map(([label, onclick]) => h('button', { type: 'button', className: 'quiet', onclick }, label)));
}

function showOutcome(turn) {
  const { status, error, code, heldBack, commit, preview, kind, report } = turn;
  for (const file of commit?.files ?? []) turn.files.set(file.path, file);
  const parts = [];
  if (turn.files.size) parts.push(h('ul', { className: 'files', ariaLabel: 'Files changed' }, [...turn.files.values()].map(fileLine)));
  if (kind === 'alt-text' && report) parts.push(...reportParts(report));
  if (status === 'failed') {
    parts.push(h('div', { className: 'notice failed' }, h('strong', {}, error || 'This turn failed.'), ' ', ADVICE[code] ?? 'Put it back in the box to try again.'));
  }
  if (preview?.errors?.length) {
    parts.push(h('div', { className: 'notice failed' }, h('strong', {}, 'The site has an error now.'), h('ul', {}, preview.errors.map(errorLine))));
  }
  if (heldBack?.length) {
    parts.push(h('div', { className: 'notice' }, h('strong', {}, 'Held back from the commit'),
      h('ul', {}, heldBack.map(({ path, reason }) => h('li', {}, h('span', { className: 'path' }, path), ` ${reason ?? ''}`)))));
  }
  turn.parts.outcome.replaceChildren(...parts);
}

function fileLine({ path, status, additions, deletions }) {
  return h('li', {}, h('span', { className: 'change' }, status), h('span', { className: 'path' }, shortPath(path)),
    additions != null && h('span', { className: 'plus' }, `+${additions}`),
    deletions != null && h('span', { className: 'minus' }, `−${deletions}`));
}

function errorLine({ file, line, message }) {
  return h('li', {}, file ? h('span', { className: 'path' }, shortPath(file) + (line ? `:${line}` : '')) : null, ' ', message);
}

function shortPath(path) {
  const text = String(path ?? '');
  return state.worktree && text.startsWith(`${state.worktree}/`) ? text.slice(state.worktree.length + 1) : text.replace(/^.*\/threads\/[^/]+\//, '');
}

// ---------------------------------------------------------------- Turns: what happens

const onEvent = {
  'turn.queued': (turn, { position }) => { turn.status = 'queued'; turn.note = position > 0 ? `place ${position}` : ''; },
  'turn.started': (turn) => { update(turn, { status: 'running', startedAt: turn.startedAt ?? Date.now() }); announce('The agent has started.'); },
  'turn.waiting': (turn, { reason, until }) => { turn.note = `waiting: ${reason}${until ? `, until ${new Date(until).toLocaleTimeString()}` : ''}`; },
  'text.delta': (turn, { text }) => addText(turn, text),
  'tool.started': (turn, tool) => startStep(turn, tool),
  'tool.finished': (turn, tool) => finishStep(turn, tool),
  'file.changed': (turn, { path, status }) => { turn.files.set(path, { path, status }); },
  'preview.updated': () => pollPreviewSoon(),
  'preview.error': (turn, { errors }) => { showPreview({ ...state.preview, state: 'error', errors }); pollPreviewSoon(); },
  'budget.warning': (turn, { spentUsd, limitUsd }) => { turn.note = `${money(spentUsd)} of ${money(limitUsd)} spent`; },
  'commit.created': (turn, { commit }) => { turn.commit = commit; },
  'turn.completed': (turn, data) => settle(turn, 'completed', data),
  'turn.failed': (turn, data) => settle(turn, 'failed', data),
  'turn.cancelled': (turn, data) => settle(turn, 'cancelled', data),
  'turn.recovered': (turn, data) => settle(turn, 'recovered', data),
};

// What these say was true then; in the replay of an old turn it is not true now.
const ONLY_NOW = /^(turn\.(queued|started|waiting)|preview\.|budget\.)/;

function handleEvent(turn, { event, data }) {
  const handler = onEvent[event];
  if (!handler) return;       // events may be added to the contract
  if (turn.following === 'replay' && ONLY_NOW.test(event)) return;
  if (turn.isWaiting) turn.note = '';
  turn.isWaiting = event === 'turn.waiting';
  handler(turn, data);
  if (event !== 'text.delta') showFoot(turn);
  keepAtBottom();
}

function addText(turn, text) {
  let last = turn.parts.log.lastElementChild;
  if (!last?.classList.contains('text')) {
    if (!text.trim()) return;
    last = h('div', { className: 'text' }, '');
    last.append(document.createTextNode(''));
    turn.parts.log.append(last);
    text = text.trimStart();
  }
  last.lastChild.appendData(plain(text));
}

function startStep(turn, { id, name, input }) {
  let group = turn.parts.log.lastElementChild;
  if (!group?.classList.contains('steps')) {
    group = h('details', { className: 'steps', open: true }, h('summary', {}), h('ol', {}));
    turn.parts.log.append(group);
  }
  const [doing, done, key] = TOOLS[name] ?? [name, name, ''];
  const target = key === 'file_path' ? shortPath(input?.[key]) : String(input?.[key] ?? '').split('\n')[0];
  // What a file tool answers names the file once more, and says no more than that it worked.
  const step = { done, isFile: key === 'file_path', verb: h('span', {}, doing), line: h('li', { className: 'step', data: { state: 'running' } }) };
  step.body = h('span', {}, step.verb, ' ', h('code', {}, clip(target, 160)));
  step.line.append(step.body);
  turn.steps.set(id, step);
  group.lastElementChild.append(step.line);
  group.firstElementChild.textContent = plural(group.lastElementChild.childElementCount, 'step');
  if (turn.following === 'live') announce(`${doing} ${clip(target, 80)}`);
}

function finishStep(turn, { id, ok, summary }) {
  const step = turn.steps.get(id);
  if (!step) return;
  step.line.dataset.state = ok ? 'done' : 'failed';
  if (ok) step.verb.textContent = plain(step.done);
  const text = String(summary ?? '');
  const said = step.isFile ? '' : clip(text.split('\n')[0], 80);
  const note = ok ? said : `failed: ${clip(text, 400)}`;
  if (note) step.body.append(' ', h('span', { className: 'why' }, note));
}

function settle(turn, status, { result = {}, ...data }) {
  for (const { line } of turn.steps.values()) if (line.dataset.state === 'running') line.dataset.state = 'stopped';
  for (const group of turn.parts.log.querySelectorAll('.steps')) group.open = group.querySelectorAll('.step').length <= 3;
  if (!turn.parts.log.querySelector('.text') && result.text) addText(turn, result.text);
  const { turnId, context, ...facts } = { error: data.error, code: data.code, ...result };
  turn.settled = true;
  turn.note = '';
  update(turn, { ...facts, status: facts.status ?? status });
  pollPreviewSoon();
  if (turn.following === 'live') announce(`${STATUS[turn.status] ?? turn.status}. ${turn.error ?? `${plural(turn.files.size, 'file')} changed.`}`);
}

function followActive() {
  const active = [...state.turns.values()].filter((turn) => ACTIVE.has(turn.status));
  active.slice(0, STREAMS_AT_ONCE).filter((turn) => !turn.following).forEach((turn) => follow(turn, 'live'));
}

async function replay(turn) {
  if (turn.following) return;
  turn.parts.log.replaceChildren();
  turn.lastEventId = '';
  const { status } = turn;
  await follow(turn, 'replay');
  if (!turn.settled) update(turn, { status });
}

/** Reads a turn's events until its last one, through broken connections and restarts. */
async function follow(turn, how) {
  turn.following = how;
  for (let attempt = 0; !turn.settled; attempt++) {
    const reached = turn.lastEventId;
    try {
      if (attempt > 2) await checkOutcome(turn);   // the journal may have ended without saying so
      else await readEvents(turn);
    } catch (error) {
      if (error instanceof ApiError) { giveUp(turn, error); break; }
      if (!(error instanceof ConnectionLost)) console.warn('reading events', error);
    }
    if (turn.settled) break;
    if (turn.lastEventId !== reached) attempt = 0;
    await sleep(backoff(attempt));
    await state.reconnecting;
    if (attempt > 2) attempt = 0;
  }
  turn.following = false;
  followActive();
}

function giveUp(turn, error) {
  if (ACTIVE.has(turn.status)) update(turn, { status: 'unknown' });
  turn.note = error.status === 404 ? 'the service keeps no events of it' : error.message;
  turn.settled = true;
  showFoot(turn);
}

async function checkOutcome(turn) {
  const result = resultOf(await call(`/api/turns/${encodeURIComponent(turn.id)}`));
  if (!ACTIVE.has(result.status)) settle(turn, result.status, { result });
}

async function readEvents(turn) {
  const headers = turn.lastEventId ? { 'Last-Event-ID': turn.lastEventId } : {};
  const refused = ({ status }) => (status >= 500 ? new ConnectionLost() : new ApiError(status, '', `The service answered ${status}.`));
  for await (const message of events(`/api/turns/${encodeURIComponent(turn.id)}/events`, { headers }, refused)) {
    if (Number(message.id) <= Number(turn.lastEventId || -1)) continue;   // a replay may overlap what we have
    turn.lastEventId = message.id;
    handleEvent(turn, message);
    if (turn.settled) break;
  }
}

/** What a request is answered with, event by event. `refused` makes the error of a response that has none. */
async function* events(path, options, refused) {
  const quiet = new AbortController();
  let timer;
  const heard = () => { clearTimeout(timer); timer = setTimeout(() => quiet.abort(), SILENCE_MS); };
  heard();
  try {
    const response = await request(path, { ...options, signal: quiet.signal, headers: { ...options.headers, Accept: 'text/event-stream' } });
    if (!response.ok) throw await refused(response);
    yield* messages(response.body, heard);
  } finally {
    clearTimeout(timer);
  }
}

/** Server-sent events, read by hand because EventSource cannot send an Authorization header. */
async function* messages(body, heard) {
  let rest = '';
  let message = { event: 'message', data: [] };
  let id = '';
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      heard();
      const lines = (rest + value).split(/\r\n|\n|\r(?!$)/);
      rest = lines.pop();
      for (const line of lines) {
        const [, field, content] = /^([^:]*):? ?(.*)$/s.exec(line);
        if (field === 'id') id = content;
        else if (field === 'event') message.event = content;
        else if (field === 'data') message.data.push(content);
        else if (line === '') {
          if (message.data.length) yield { id, event: message.event, data: JSON.parse(message.data.join('\n')) };
          message = { event: 'message', data: [] };
        }
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

async function cancel(turn) {
  const before = turn.status;
  turn.status = 'stopping';
  showFoot(turn);
  announce('Stopping.');
  try {
    await throughOutages(() => post(`/api/turns/${encodeURIComponent(turn.id)}/cancel`, {}));
    if (!turn.following) await checkOutcome(turn);    // no stream of ours will say so
  } catch (error) {
    if (turn.status === 'stopping') turn.status = before;
    showFoot(turn);
    showProblem(error);
  }
}

/** Undoes one turn, or brings it back: by a commit of its own, which later turns may stand in the way of. */
async function takeBack(turn, how, done) {
  if (state.sending || state.phase !== 'ready') return;
  setSending(true);
  try {
    await throughOutages(() => post(threadPath(how), { turnId: turn.id }));
    await throughOutages(loadHistory);
    announce(done);
  } catch (error) {
    showProblem(error);
  } finally {
    setSending(false);
    pollPreviewSoon();
  }
}

/** What was said before, shown while the site is made ready. Asking for a new thread's would be an error. */
async function loadEarlier() {
  const { client, user, thread } = state.ids;
  try {
    const threads = resultOf(await call(`/api/threads?${new URLSearchParams({ clientId: client, userId: user })}`));
    if (!threads.some(({ threadId }) => threadId === thread)) return;
  } catch (error) {
    if (error instanceof ApiError) return;    // init says what is wrong
    throw error;
  }
  await loadHistory();
}

async function loadHistory() {
  let turns;
  try {
    turns = resultOf(await call(threadPath('history'))).turns ?? [];
  } catch (error) {
    if (error instanceof ApiError) return;    // a thread that has no history yet, or none to show
    throw error;
  }
  let previous = null;
  for (const facts of turns.reverse()) previous = noteTurn(facts, previous).element;
  followActive();
  keepAtBottom();
}

// ---------------------------------------------------------------- Composer

const draftKey = () => `greenroom.draft:${Object.values(state.ids).join('/')}`;
const saveDraft = () => state.ids && sessionStorage.setItem(draftKey(), JSON.stringify(state.draft));
const runningTurn = () => [...state.turns.values()].find((turn) => ['running', 'stopping'].includes(turn.status));

function restoreDraft() {
  const typed = $('instruction').value;
  try {
    Object.assign(state.draft, JSON.parse(sessionStorage.getItem(draftKey())));
  } catch { /* an unreadable draft is no draft */ }
  if (typed && typed !== state.draft.text) return editDraft();    // by someone who did not wait for us
  $('instruction').value = state.draft.text;
  $('composer').elements.mode.value = state.draft.mode;
  fitBox();
}

// A changed draft is another instruction, so it gets another idempotency key when it is sent.
function editDraft() {
  state.draft = { text: $('instruction').value, mode: $('composer').elements.mode.value, key: null };
  saveDraft();
  fitBox();
  $('problem').hidden = true;
}

function fillBox(text) {
  $('instruction').value = text;
  editDraft();
  showView('chat');
  $('instruction').focus();
  $('instruction').setSelectionRange(text.length, text.length);
}

function fitBox() {
  const box = $('instruction');
  box.style.height = 'auto';
  box.style.height = `${box.scrollHeight}px`;
}

async function send() {
  const text = state.draft.text.trim();
  if (!text || state.sending) return;
  if (state.phase !== 'ready') return showHint('The site is not ready yet. Your text is kept.');
  const mode = state.draft.mode;
  const key = state.draft.key ??= randomKey();
  saveDraft();
  setSending(true);
  try {
    const answer = await throughOutages(
      () => post('/api/execute', { ...bodyIds(), instruction: text, mode, async: true }, { 'Idempotency-Key': key }),
      () => state.draft.key === key,
    );
    if (answer) sent(resultOf(answer).turnId, text, mode, key);
  } catch (error) {
    showProblem(error);
  } finally {
    setSending(false);
  }
}

function sent(turnId, instruction, mode, key) {
  if (state.draft.key === key) fillBox('');
  state.atBottom = true;
  toggleSamples(false);     // the badge brings them back
  noteTurn({ turnId, instruction, mode });
  announce('Sent.');
  followActive();
  keepAtBottom();
}

// crypto.randomUUID is missing on plain http, where a laptop on the network may well be.
function randomKey() {
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, '0')).join('');
}

function setSending(sending) {
  state.sending = sending;
  if (sending) {
    state.tokenDeclined = false;
    $('problem').hidden = true;
  }
  showComposer();
}

function showComposer() {
  const running = runningTurn();
  $('send').disabled = state.phase !== 'ready' || state.sending;
  $('send').textContent = state.sending ? 'Sending…' : 'Send';
  $('stop').hidden = !running;
  $('stop').disabled = running?.status === 'stopping';
  const { describing } = state;
  $('describe').disabled = state.phase !== 'ready';
  $('describe').textContent = !describing ? 'Describe images' : describing.isStopping ? 'Stopping…' : 'Stop describing';
  document.title = `${running || describing ? '● ' : ''}${state.ids?.thread ?? ''} · greenroom`;
  $('hint').textContent = hintText(running);
}

function hintText(running) {
  if (Date.now() < state.hint.until) return state.hint.text;
  if (state.phase === 'failed') return 'Not ready: the preview says why';
  if (state.phase !== 'ready') return `Getting the site ready… ${sincePreparing()}`;
  if (!running && state.describing) return 'You can send instructions meanwhile. Esc stops the describing.';
  return running ? 'You can send more; it waits in line. Esc stops.' : 'Enter sends, Shift+Enter makes a new line';
}

function showHint(text, armsStop = false) {
  state.hint = { text, until: Date.now() + 3000, armsStop };
  showComposer();
  announce(text);
}

function showProblem(error) {
  if (!(error instanceof ApiError)) console.error(error);
  $('problem').textContent = plain([error.message, ADVICE[error.code]].filter(Boolean).join(' '));
  $('problem').hidden = false;
}

function escapePressed() {
  const running = runningTurn();
  if (running ? running.status !== 'running' : !state.describing) return;
  const isSecond = state.hint.armsStop && Date.now() < state.hint.until;
  state.hint.until = 0;
  if (isSecond && running) cancel(running);
  else if (isSecond) stopDescribing();
  else showHint('Press Esc again to stop.', true);
}

// ---------------------------------------------------------------- Preview

const PREVIEW = { off: 'Off', starting: 'Starting…', live: 'Live', asleep: 'Asleep; reload wakes it', error: 'Error', stale: 'Showing the last version that worked' };

function webAddress(text) {
  const url = URL.canParse(text ?? '') ? new URL(text) : null;
  return url && ['http:', 'https:'].includes(url.protocol) ? url.href : '';
}

function showPreview(preview) {
  state.preview = { ...preview, errors: preview.errors ?? [] };
  const address = webAddress(preview.previewUrl || preview.url);
  const label = PREVIEW[preview.state] ?? preview.state;
  if ($('light').textContent !== label) $('light').textContent = plain(label);
  $('light').dataset.state = preview.state;
  $('open').hidden = $('reload').disabled = !address;
  if (address) $('open').href = address;
  $('build-errors').hidden = !state.preview.errors.length;
  $('build-errors').replaceChildren(...state.preview.errors.map(errorLine));
  // Loaded once and then left alone: the dev server updates the page itself, and a new address would lose the place in it.
  if (['live', 'asleep', 'stale'].includes(preview.state) && $('frame').hidden) loadFrame();
  if ($('frame').hidden && state.phase === 'ready') showSetup();
}

function loadFrame() {
  $('frame').src = $('open').href;
  $('frame').hidden = false;
  $('setup').hidden = true;
}

function pollPreviewSoon() {
  clearTimeout(state.previewTimer);
  if (state.phase === 'ready') state.previewTimer = setTimeout(pollPreview, 150);
}

async function pollPreview() {
  if (document.hidden) return;    // becoming visible polls again
  try {
    showPreview(resultOf(await call(threadPath('preview'))));
  } catch (error) {
    if (!(error instanceof ConnectionLost || error instanceof ApiError)) throw error;
  }
  clearTimeout(state.previewTimer);
  state.previewTimer = setTimeout(pollPreview, state.preview.state === 'starting' ? 1000 : 10_000);
}

const sincePreparing = () => duration(Math.max(1000, Date.now() - state.preparingSince));

function showSetup(error) {
  // What a program wrote may come below the sentence.
  const [first, ...output] = (error?.message ?? '').split('\n');
  const texts = {
    connecting: ['Connecting…', ''],
    preparing: ['Checking the site out, installing…', `This can take a minute the first time. ${sincePreparing()} so far.`],
    failed: [first, ADVICE[error?.code] ?? ''],
    ready: {
      starting: ['Starting the dev server…', `${sincePreparing()} so far.`],
      off: ['No preview', 'The dev server is not running. You can still give instructions.'],
      error: ['The site does not start', 'Its errors are listed above, if it gave any. You can ask the agent to fix them.'],
    }[state.preview.state] ?? ['Waiting for the preview…', ''],
  }[state.phase];
  const [headline, detail] = texts;
  if ($('setup-text').textContent !== plain(headline)) $('setup-text').textContent = plain(headline);
  $('setup-detail').textContent = plain(detail);
  $('setup-output').textContent = plain(output.join('\n'));
  $('setup-output').hidden = !output.length;
  $('again').hidden = state.phase !== 'failed';
  $('setup').toggleAttribute('data-calm', state.phase === 'failed' || (state.phase === 'ready' && state.preview.state !== 'starting'));
}

// ---------------------------------------------------------------- Start and life

async function start() {
  setPhase('connecting');
  try {
    await identify();
    await prepare();
  } catch (error) {
    setPhase('failed', error);
    announce(error.message);
  }
}

async function identify() {
  const health = await throughOutages(() => call('/health'));
  const query = new URLSearchParams(location.search);
  state.pinned = { client: health.client, user: health.user };
  state.ids = {
    client: query.get('client') || health.client || 'demo',
    user: query.get('user') || health.user || 'me',
    thread: query.get('thread') || health.thread || 'main',
  };
  const { client, user, thread } = state.ids;
  $('where').replaceChildren(h('span', { className: 'wide' }, `${client} / ${user} / `), h('b', {}, thread), h('span', { className: 'unseen' }, ', switch'));
  if (health.mode === 'rehearsal') showSamples(health.rehearsal?.examples ?? []);
  restoreDraft();
}

async function prepare() {
  setPhase('preparing');
  const [init] = await Promise.all([
    throughOutages(() => post('/api/init', { ...bodyIds(), waitForPreview: false })),
    throughOutages(loadEarlier),
  ]);
  const { workspace, preview } = resultOf(init);
  state.worktree = workspace?.projectPath ?? '';
  setPhase('ready');
  if (preview) showPreview(preview);
  catchUp();
}

function setPhase(phase, error) {
  state.phase = phase;
  if (phase === 'connecting') state.preparingSince = Date.now();
  showSetup(error);
  showComposer();
  $('light').textContent ||= 'Not there yet';
}

/** What may have happened while nobody looked: init recovered a turn, someone else sent one, the preview changed. */
function catchUp() {
  if (document.hidden || state.phase !== 'ready') return;
  touch();
  pollPreviewSoon();
  loadHistory().catch((error) => { if (!(error instanceof ConnectionLost)) throw error; });
}

// A visible page is a person, and keeps the container awake.
function touch() {
  if (!document.hidden && state.phase === 'ready' && !state.reconnecting) post('/api/idle/touch', {}).catch(() => {});
}

function tick() {
  for (const turn of state.turns.values()) if (turn.status === 'running') showStatus(turn);
  if (state.phase === 'preparing' || (state.phase === 'ready' && $('frame').hidden)) showSetup();
  $('hint').textContent = hintText(runningTurn());
}

function showSamples(examples) {
  $('rehearsal').hidden = false;
  toggleSamples(true);
  const samples = [...new Set([...DEFAULT_SAMPLES, ...examples.filter((text) => typeof text === 'string')])];
  $('chips').replaceChildren(...samples.map((text) =>
    h('li', {}, h('button', { type: 'button', onclick: () => fillBox(text.replace(/(…|\.\.\.)$/, '')) }, text))));
}

function toggleSamples(show) {
  $('samples').hidden = !show;
  $('rehearsal').ariaExpanded = String(show);
  keepAtBottom();
}

async function switchThread() {
  if (!state.ids) return;
  const fields = $('switch').elements;
  for (const [name, value] of Object.entries(state.ids)) {
    fields[name].value = value;
    fields[name].readOnly = state.pinned[name] === value;
    fields[name].pattern = '(?!.*\\.\\.)(?!.*(\\.|\\.lock)$)[A-Za-z0-9][A-Za-z0-9._\\-]*';
  }
  if (await ask($('switch-dialog')) !== 'ok') return;
  const names = Object.keys(state.ids).map((name) => [name, fields[name].value]);
  location.search = new URLSearchParams(names);
}

// ---------------------------------------------------------------- Layout

function keepAtBottom() {
  if (state.atBottom) $('scroll').scrollTop = $('scroll').scrollHeight;
  $('jump').hidden = state.atBottom;
}

function scrolled() {
  const { scrollTop, scrollHeight, clientHeight } = $('scroll');
  state.atBottom = scrollHeight - scrollTop - clientHeight < 60;
  if (state.atBottom) $('jump').hidden = true;
}

function press(group, isPressed) {
  for (const button of group.querySelectorAll('button')) button.ariaPressed = String(isPressed(button));
}

function showView(view) {
  document.body.dataset.view = view;
  press(document.querySelector('.views'), (button) => button.dataset.view === view);
}

function setChatWidth(px) {
  const max = Math.max(320, innerWidth - 280);
  const width = Math.round(Math.min(max, Math.max(320, px)));
  document.documentElement.style.setProperty('--chat-width', `${width}px`);
  Object.assign($('splitter'), { ariaValueMin: '320', ariaValueMax: String(max), ariaValueNow: String(width) });
  return width;
}

const restoreChatWidth = () => setChatWidth(Number(localStorage.getItem('greenroom.chatWidth')) || 480);
const keepChatWidth = (px) => localStorage.setItem('greenroom.chatWidth', setChatWidth(px));

function dragSplitter(event) {
  const splitter = $('splitter');
  const move = (e) => keepChatWidth(e.clientX);
  splitter.setPointerCapture(event.pointerId);
  document.body.classList.add('dragging');
  splitter.addEventListener('pointermove', move);
  splitter.addEventListener('lostpointercapture', () => {
    splitter.removeEventListener('pointermove', move);
    document.body.classList.remove('dragging');
  }, { once: true });
}

function splitterKey(event) {
  const step = event.shiftKey ? 96 : 24;
  const now = $('chat').offsetWidth;
  const target = { ArrowLeft: now - step, ArrowRight: now + step, Home: 0, End: innerWidth }[event.key];
  if (target === undefined) return;
  event.preventDefault();
  keepChatWidth(target);
}

function pageKey(event) {
  if (document.querySelector('dialog[open]') || event.isComposing) return;
  const isTyping = event.target.matches('textarea, input:not([type=radio])');
  const wantsBox = (event.key === '/' && !isTyping && !event.ctrlKey && !event.metaKey) || (event.key.toLowerCase() === 'k' && (event.ctrlKey || event.metaKey));
  if (wantsBox) {
    event.preventDefault();
    showView('chat');
    $('instruction').focus();
  } else if (event.key === 'Escape') {
    escapePressed();
  }
}

function listen() {
  $('composer').addEventListener('submit', (event) => { event.preventDefault(); send(); });
  $('composer').addEventListener('input', editDraft);
  $('instruction').addEventListener('keydown', (event) => {
    if (event.key !== 'Enter' || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    send();
  });
  $('stop').addEventListener('click', () => { cancel(runningTurn()); $('instruction').focus(); });
  $('describe').addEventListener('click', describeOrStop);
  $('where').addEventListener('click', switchThread);
  $('rehearsal').addEventListener('click', () => toggleSamples($('samples').hidden));
  $('again').addEventListener('click', () => { state.tokenDeclined = false; start(); });
  $('reload').addEventListener('click', loadFrame);
  $('jump').addEventListener('click', () => { state.atBottom = true; keepAtBottom(); $('instruction').focus(); });
  $('scroll').addEventListener('scroll', scrolled, { passive: true });
  $('splitter').addEventListener('pointerdown', dragSplitter);
  $('splitter').addEventListener('dblclick', () => keepChatWidth(480));
  $('splitter').addEventListener('keydown', splitterKey);
  document.querySelector('.views').addEventListener('click', ({ target }) => target.dataset.view && showView(target.dataset.view));
  document.querySelector('.widths').addEventListener('click', ({ target }) => {
    if (!target.dataset.width) return;
    $('stage').dataset.width = target.dataset.width;
    press(target.parentElement, (button) => button === target);
  });
  for (const button of document.querySelectorAll('[data-close]')) button.addEventListener('click', () => button.closest('dialog').close());
  document.addEventListener('keydown', pageKey);
  document.addEventListener('visibilitychange', catchUp);
  addEventListener('resize', restoreChatWidth);
  setInterval(touch, 30_000);
  setInterval(tick, 1000);
}

restoreChatWidth();
listen();
start();
