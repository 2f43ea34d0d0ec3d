// Texts for the images of a thread's site. Images are described before there is a turn, so this shows how far it is and
// how it ended; what it changed is a turn like any other.

import {
  $, ADVICE, ApiError, ConnectionLost, announce, connectionLost, events, failure, h, keepAtBottom, loadHistory, noteTurn, plural,
  pollPreviewSoon, post, settle, shortPath, showComposer, showHint, showProblem, state, threadPath, throughOutages,
} from './studio.js';

const NOTHING_CHANGED = 'Nothing of the site was changed.';
const AGAIN = `${NOTHING_CHANGED} Press “Describe images” to try again.`;
// What is said of instructions does not fit here.
const OWN_ADVICE = {
  agent_failed: `${AGAIN} If it keeps failing, the service’s log says why.`,
  queue_full: `${NOTHING_CHANGED} Let some turns finish, then press “Describe images” again.`,
  circuit_open: 'The model does not answer well at the moment. Wait a minute, then press “Describe images” again.',
};
const TELL_EVERY_MS = 10_000;   // a listener wants to know that it goes on, not each image

/** Begins, or stops what was begun: one button for both, so that the keyboard keeps its place. */
export function describeOrStop() {
  if (state.describing) stopDescribing();
  else describe();
}

async function describe() {
  if (state.phase !== 'ready') return showHint('The site is not ready yet.');
  document.querySelector('.turn.job')?.remove();
  $('problem').hidden = true;
  state.tokenDeclined = false;
  const job = state.describing = newJob();
  show(job);
  announce('Describing the images of the site.');
  try {
    const result = await throughOutages(() => listen(job), () => !job.isStopping);
    await end(job, result);
  } catch (error) {
    if (!(error instanceof ApiError)) console.error(error);
    over(job, 'failed', [notice('failed', error.message, OWN_ADVICE[error.code] ?? ADVICE[error.code] ?? AGAIN)]);
    announce(error.message);
  } finally {
    state.describing = null;
    showComposer();
    keepAtBottom();
  }
}

export async function stopDescribing() {
  const job = state.describing;
  if (!job || job.isStopping) return;
  job.isStopping = true;
  show(job);
  announce('Stopping.');
  await cancelCall(job);
}

async function cancelCall(job) {
  if (!job.callId) return;    // as soon as it has one
  try {
    await throughOutages(() => post(`/api/calls/${encodeURIComponent(job.callId)}/cancel`, {}), () => false);
  } catch (error) {
    if (error.status === 404) return;   // it is over
    job.isStopping = false;
    show(job);
    showProblem(error);
  }
}

/** Follows the call to its end. One that was cut off is cancelled, and the next one goes on with what it had. */
async function listen(job) {
  Object.assign(job, { callId: '', done: 0, total: 0 });
  const refused = async (response) => failure(response.status, await response.json().catch(() => null));
  try {
    for await (const { event, data } of events(threadPath('alt-text'), { method: 'POST', body: {} }, refused)) {
      if (event === 'alt_text.completed' || event === 'alt_text.cancelled') return data.result;
      if (event === 'alt_text.failed') throw failure(0, data);
      if (event === 'alt_text.started') {
        job.callId = data.callId;
        if (job.isStopping) cancelCall(job);
      }
      if (event === 'alt_text.progress') Object.assign(job, { done: data.done, total: data.total });
      show(job);
    }
  } catch (error) {
    if (error instanceof ApiError || error instanceof ConnectionLost) throw error;
  }
  throw connectionLost();
}

async function end(job, result) {
  if (!result) {
    await throughOutages(loadHistory);
    over(job, 'cancelled', [h('p', { className: 'text' }, 'Stopped while the connection was lost. If it had changed anything by then, that is a turn above.')]);
    return announce('Stopped.');
  }
  if (result.status === 'cancelled') {
    const kept = job.done ? ` What was described by then (${plural(job.done, 'image')}) is known, and is not paid for again.` : '';
    over(job, 'cancelled', [h('p', { className: 'text' }, NOTHING_CHANGED + kept)]);
    return announce(`Stopped. ${NOTHING_CHANGED}`);
  }
  const report = result.report ?? {};
  if (result.turnId) {
    await throughOutages(loadHistory);
    job.element.remove();
    settle(noteTurn({ turnId: result.turnId, kind: 'alt-text' }), 'completed', { result });
    return announce(result.text);
  }
  const isAll = !report.person?.length && !report.stopped;
  const text = isAll ? 'Nothing to do: every image of the site has a text already.' : 'No image got a text.';
  over(job, 'completed', [h('p', { className: 'text' }, text), ...reportParts(report)]);
  announce(report.person?.length ? `${text} ${needAPerson(report.person)}.` : text);
  pollPreviewSoon();
}

// ---------------------------------------------------------------- On the page

function newJob() {
  const job = { callId: '', done: 0, total: 0, isStopping: false, toldAt: Date.now() };
  job.status = h('span', { className: 'status' });
  job.bar = h('progress', { ariaLabel: 'Images described' });
  job.outcome = h('div', {});
  job.element = h('li', { className: 'turn job' },
    h('p', { className: 'said' }, 'Describe the images'), job.outcome, h('p', { className: 'foot' }, job.status, job.bar));
  $('turns').append(job.element);
  $('empty').hidden = true;
  state.atBottom = true;
  return job;
}

function show(job) {
  const { done, total, isStopping } = job;
  const isKnown = total > 0;
  job.element.dataset.status = isStopping ? 'stopping' : 'running';
  job.bar.max = isKnown ? total : 1;
  if (isKnown) job.bar.value = done;
  else job.bar.removeAttribute('value');
  const how = isKnown && done === total ? 'Writing the texts' : isKnown ? `${done} of ${plural(total, 'image')} described` : 'Looking for images without a text';
  job.status.textContent = isStopping ? 'Stopping' : how;
  if (isKnown && done > 0 && !isStopping && Date.now() - job.toldAt > TELL_EVERY_MS) {
    job.toldAt = Date.now();
    announce(`${how}.`);
  }
  showComposer();
  keepAtBottom();
}

function over(job, status, parts) {
  job.element.dataset.status = status;
  job.status.textContent = { completed: 'Done', cancelled: 'Stopped', failed: 'Failed' }[status];
  job.bar.remove();
  job.outcome.replaceChildren(...parts);
}

const notice = (kind, title, ...rest) => h('div', { className: `notice ${kind}` }, h('strong', {}, title), ' ', ...rest);
const needAPerson = (person) => `${plural(person.length, 'image')} ${person.length === 1 ? 'needs' : 'need'} a person`;
const sentence = (text) => `${text.charAt(0).toUpperCase()}${text.slice(1)}${/[.!?]$/.test(text) ? '' : '.'}`;

function place({ file, line, image }) {
  return [image && image !== file && h('span', { className: 'path' }, shortPath(image)), image && image !== file && ' in ',
    h('span', { className: 'path' }, `${shortPath(file)}:${line}`)];
}

/** Which images got which text, and which need a person and why. */
export function reportParts({ done = [], person = [], decorative = 0, more = 0, stopped }) {
  const parts = [];
  if (done.length) {
    // In its own language, for whoever has it read out.
    const items = done.map((one) => h('li', {}, h('q', { lang: one.language ?? '' }, one.alt), h('span', { className: 'where-it-is' }, place(one))));
    parts.push(h('details', { className: 'report', open: done.length <= 12 },
      h('summary', {}, `${plural(done.length, 'image')} with a new text`), h('ul', {}, items)));
  }
  if (person.length) {
    const items = person.map((one) => h('li', {}, place(one), h('span', { className: 'why' }, sentence(one.why ?? ''))));
    parts.push(h('div', { className: 'notice report' }, h('strong', {}, needAPerson(person)), h('ul', {}, items)));
  }
  if (stopped) parts.push(notice('', 'Not all images were described.', `${sentence(stopped)} Press “Describe images” for the rest.`));
  const rest = [
    decorative && `${plural(decorative, 'image')} only there to look good, without a text as it should be.`,
    more && `${plural(more, 'more place')} not listed here.`,
  ].filter(Boolean);
  if (rest.length) parts.push(h('p', { className: 'aside' }, rest.join(' ')));
  return parts;
}
