// SPDX-License-Identifier: BSD-2-Clause
// The page: a card for each VM, kept up to date by the daemon's events and by asking every two seconds, and a viewer that
// shows a screen with noVNC or a console with xterm.js. All text from the daemon or a guest is put in as text, never as HTML.

const find = (id) => document.getElementById(id);
const cards = new Map();
const cpuBefore = new Map();
const visible = new Set();
let events = null;
let polling = 0;
let viewer = null;

async function call(method, path, body) {
    const answer = await fetch(path, { method, body, headers: { Accept: 'application/json' } });
    if (answer.status === 401 && path !== '/session') {
        askForToken();
    }
    const data = await answer.json();
    if (!answer.ok) {
        throw new Error(data.error ?? answer.statusText);
    }
    return data;
}

// Signing in.

function askForToken(message = '') {
    stopLooking();
    find('login').hidden = false;
    find('vms').hidden = true;
    find('leave').hidden = true;
    find('login-error').textContent = message;
    find('token').focus();
}

async function signIn(token) {
    try {
        await call('POST', '/session', token);
        find('token').value = '';
        start();
    } catch (wrong) {
        askForToken(wrong.message);
    }
}

// The list.

function start() {
    find('login').hidden = true;
    find('vms').hidden = false;
    find('leave').hidden = false;
    stopLooking();
    refresh();
    polling = setInterval(refresh, 2000);
    events = new EventSource('/v1/events');
    for (const what of ['starting', 'running', 'stopping', 'ended', 'down', 'failed', 'backoff', 'waiting', 'healthy', 'unhealthy', 'changed']) {
        events.addEventListener(what, soon);
    }
}

function stopLooking() {
    clearInterval(polling);
    events?.close();
    events = null;
}

let waiting = 0;
function soon() {
    clearTimeout(waiting);
    waiting = setTimeout(refresh, 100);
}

let asked = 0;
async function refresh() {
    const mine = ++asked;
    let list;
    try {
        list = await call('GET', '/v1/vms');
    } catch (failure) {
        find('summary').textContent = failure instanceof TypeError ? 'The daemon does not answer.' : failure.message;
        return;
    }
    if (mine !== asked) {
        return;
    }
    const running = list.vms.filter((vm) => vm.state === 'running').length;
    find('summary').textContent = `${running} of ${list.vms.length} running`;
    find('errors').hidden = list.errors.length === 0;
    find('errors').textContent = list.errors.join('\n');
    const names = new Set(list.vms.map((vm) => vm.name));
    for (const [name, card] of cards) {
        if (!names.has(name)) {
            card.remove();
            cards.delete(name);
            visible.delete(name);
        }
    }
    for (const vm of list.vms) {
        show(vm);
    }
    filter();
}

const watcher = new IntersectionObserver((changes) => {
    for (const change of changes) {
        const name = change.target.dataset.name;
        if (change.isIntersecting) {
            visible.add(name);
        } else {
            visible.delete(name);
        }
    }
});

function show(vm) {
    let card = cards.get(vm.name);
    if (!card) {
        card = find('card').content.firstElementChild.cloneNode(true);
        card.dataset.name = vm.name;
        card.querySelector('h2').textContent = vm.name;
        card.querySelector('.look').addEventListener('click', () => open(card.vm));
        card.querySelector('.actions').addEventListener('click', (event) => {
            if (event.target.dataset.verb) {
                act(card, event.target.dataset.verb);
            }
        });
        cards.set(vm.name, card);
        find('vms').append(card);
        watcher.observe(card);
    }
    card.vm = vm;
    card.title = vm.description ?? '';
    const state = card.querySelector('.state');
    const health = vm.health === 'healthy' || vm.health === 'unhealthy' ? `, ${vm.health}` : '';
    state.textContent = vm.state + (vm.state === 'running' ? health : '');
    state.className = `state ${vm.state}`;
    card.querySelector('.facts').textContent = facts(vm);
    card.querySelector('.note').textContent =
        card.complaint ?? (vm.changed ? 'definition changed; stop and start to use it' : vm.note ?? '');
    const up = vm.pid !== 0;
    const possible = {
        start: !up, stop: up, end: up, reset: vm.state === 'running', pause: vm.state === 'running', unpause: vm.state === 'paused',
    };
    for (const button of card.querySelectorAll('[data-verb]')) {
        button.hidden = !possible[button.dataset.verb];
        button.setAttribute('aria-label', `${button.textContent} ${vm.name}`);
    }
    const look = card.querySelector('.look');
    look.disabled = !up;
    look.setAttribute('aria-label', `Open ${vm.name}`);
    if (up && visible.has(vm.name)) {
        picture(card, vm);
    }
}

function facts(vm) {
    const words = [`${vm.cpus} CPU`, size(vm.memory)];
    if (vm.pid === 0) {
        return words.join(' · ');
    }
    if (vm.driver) {
        words.push(vm.driver);
    }
    const before = cpuBefore.get(vm.name);
    const now = performance.now();
    if (vm['cpu-time'] !== undefined) {
        if (before && before.pid === vm.pid && now > before.at) {
            words.push(`${Math.round(Math.max(0, vm['cpu-time'] - before.cpu) * 1e5 / (now - before.at))} %`);
        }
        cpuBefore.set(vm.name, { pid: vm.pid, cpu: vm['cpu-time'], at: now });
        words.push(`${size(vm.resident)} used`, `up ${span(vm.uptime)}`);
    }
    return words.join(' · ');
}

function size(bytes) {
    return bytes >= 2 ** 30 ? `${+(bytes / 2 ** 30).toFixed(1)} GiB` : `${Math.round(bytes / 2 ** 20)} MiB`;
}

function span(seconds) {
    const minutes = Math.floor(seconds / 60);
    return minutes < 1 ? `${Math.floor(seconds)} s` : minutes < 60 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

// A screen as a picture; a console as its last lines.
async function picture(card, vm) {
    if (card.looking) {
        return;
    }
    card.looking = true;
    const image = card.querySelector('img');
    const text = card.querySelector('pre');
    try {
        const path = `/v1/vms/${encodeURIComponent(vm.name)}/`;
        const answer = await fetch(vm.display ? `${path}screen?width=320` : `${path}console?tail=3000`);
        if (!answer.ok) {
            return;
        }
        image.hidden = !vm.display;
        text.hidden = vm.display;
        if (vm.display) {
            const old = image.src;
            image.src = URL.createObjectURL(await answer.blob());
            if (old) {
                URL.revokeObjectURL(old);
            }
        } else {
            text.textContent = plain(await answer.text());
        }
    } catch {
        // The next look is in two seconds.
    } finally {
        card.looking = false;
    }
}

// Console output without what steers a terminal.
function plain(text) {
    return text
        .replace(/\x1b\[[0-9;?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(\x07|\x1b\\)|\x1b./g, '')
        .replace(/[^\n]*\r(?!\n)/g, '')
        .replace(/[^\n\x20-\x7e\u00a0-\uffff]/g, '')
        .split('\n').slice(-20).join('\n');
}

async function act(card, verb) {
    const name = card.vm.name;
    if (verb === 'end' && !confirm(`End ${name} at once? Its guest is not asked.`)) {
        return;
    }
    card.complaint = undefined;
    try {
        const path = verb === 'end' ? 'stop?force=true' : verb;
        await call('POST', `/v1/vms/${encodeURIComponent(name)}/${path}`);
    } catch (failure) {
        card.complaint = failure.message;
    }
    soon();
}

function filter() {
    const word = find('filter').value.trim().toLowerCase();
    for (const [name, card] of cards) {
        card.hidden = !name.toLowerCase().includes(word) && !card.vm.state.includes(word);
    }
}

// The viewer.

function open(vm, what = vm.display ? 'screen' : 'console') {
    shut();
    find('viewer').hidden = false;
    find('viewer-name').textContent = vm.name;
    find('tab-screen').hidden = !vm.display;
    find('tab-screen').setAttribute('aria-pressed', String(what === 'screen'));
    find('tab-console').setAttribute('aria-pressed', String(what === 'console'));
    viewer = { vm, what, end: () => { } };
    const mine = viewer;
    const opening = what === 'screen' ? openScreen(mine) : openConsole(mine, false);
    opening.catch(() => say(mine, 'This vmctl was built without the viewer; see "make all".'));
}

function say(mine, text) {
    if (viewer === mine) {
        find('viewer-status').textContent = text;
    }
}

function socketAddress(vm, what) {
    const scheme = location.protocol === 'https:' ? 'wss' : 'ws';
    return `${scheme}://${location.host}/ws/${encodeURIComponent(vm.name)}/${what}`;
}

async function openScreen(mine) {
    say(mine, 'connecting');
    const { default: RFB } = await import('/novnc/core/rfb.js');
    if (viewer !== mine) {
        return;
    }
    const rfb = new RFB(find('view'), socketAddress(mine.vm, 'screen'));
    rfb.scaleViewport = true;
    rfb.background = '#111';
    rfb.addEventListener('connect', () => { say(mine, 'connected'); rfb.focus(); });
    rfb.addEventListener('disconnect', () => say(mine, 'The screen has gone.'));
    rfb.addEventListener('securityfailure', (event) => say(mine, `The VM refused: ${event.detail.reason ?? 'wrong password'}`));
    rfb.addEventListener('credentialsrequired', () => rfb.sendCredentials({ password: prompt(`VNC password of ${mine.vm.name}`) ?? '' }));
    find('keys').hidden = false;
    find('keys').onclick = () => { rfb.sendCtrlAltDel(); rfb.focus(); };
    mine.end = () => rfb.disconnect();
}

async function openConsole(mine, force) {
    say(mine, 'connecting');
    const { Terminal } = await import('/xterm/lib/xterm.mjs');
    if (viewer !== mine) {
        return;
    }
    if (!document.querySelector('link[href="/xterm/css/xterm.css"]')) {
        const sheet = document.createElement('link');
        sheet.rel = 'stylesheet';
        sheet.href = '/xterm/css/xterm.css';
        document.head.append(sheet);
    }
    const terminal = new Terminal({ cols: 80, rows: 25, scrollback: 5000, cursorBlink: true });
    terminal.open(find('view'));
    terminal.focus();
    const socket = new WebSocket(`${socketAddress(mine.vm, 'console')}?write=1${force ? '&force=1' : ''}`);
    socket.binaryType = 'arraybuffer';
    const encoder = new TextEncoder();
    let writer = false;
    const send = (bytes) => writer && socket.readyState === WebSocket.OPEN && socket.send(bytes);
    terminal.onData((text) => send(encoder.encode(text)));
    terminal.onBinary((text) => send(Uint8Array.from(text, (letter) => letter.charCodeAt(0))));
    socket.onmessage = (event) => {
        if (typeof event.data === 'string') {
            writer = JSON.parse(event.data).writer === true;
            say(mine, writer ? 'connected' : 'Somebody else types; you watch.');
            find('take').hidden = writer;
        } else {
            terminal.write(new Uint8Array(event.data));
        }
    };
    socket.onclose = () => say(mine, 'The console has gone.');
    find('take').onclick = () => {
        mine.end();
        find('take').hidden = true;
        openConsole(mine, true);
    };
    mine.terminal = terminal;
    mine.end = () => { socket.onclose = null; socket.close(); terminal.dispose(); };
}

function shut() {
    viewer?.end();
    viewer = null;
    find('view').replaceChildren();
    find('keys').hidden = true;
    find('take').hidden = true;
    find('viewer').hidden = true;
    find('viewer-status').textContent = '';
}

find('filter').addEventListener('input', filter);
find('close').addEventListener('click', shut);
find('tab-screen').addEventListener('click', () => open(viewer.vm, 'screen'));
find('tab-console').addEventListener('click', () => open(viewer.vm, 'console'));
find('leave').addEventListener('click', async () => {
    await call('POST', '/session/end');
    shut();
    askForToken();
});
find('login').addEventListener('submit', (event) => {
    event.preventDefault();
    signIn(find('token').value.trim());
});

// An address with the token behind "#": it is traded for a cookie and taken out of the address bar.
const token = new URLSearchParams(location.hash.slice(1)).get('token');
history.replaceState(null, '', location.pathname);
if (token) {
    signIn(token);
} else {
    start();
}
