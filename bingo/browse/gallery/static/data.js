// The gallery's data. Scripts in data/ call bingo.meta, bingo.columns and bingo.put: a page opened from a file may load scripts,
// but fetch nothing. Blocks are loaded when a row in them is asked for, and the oldest are forgotten.
"use strict";

const bingo = (() => {
  const MOST_BLOCKS = { bags: 64, paths: 128 };
  const blocks = { bags: new Map(), paths: new Map() };
  const waiting = new Map();
  const arrays = { int16: Int16Array, int32: Int32Array };
  const store = { info: null, column: {} };

  function bytes(base64) {
    if (Uint8Array.fromBase64) return Uint8Array.fromBase64(base64);
    const text = atob(base64);
    const array = new Uint8Array(text.length);
    for (let i = 0; i < text.length; i++) array[i] = text.charCodeAt(i);
    return array;
  }

  function meta(info) {
    store.info = info;
  }

  function columns(encoded) {
    for (const [name, [type, base64]] of Object.entries(encoded)) store.column[name] = new arrays[type](bytes(base64).buffer);
  }

  function put(kind, number, content) {
    let block = content;
    if (kind === "bags") {
      const buffer = bytes(content).buffer;
      const count = buffer.byteLength / 6; // four bytes of a member, two of its similarity
      block = { members: new Int32Array(buffer, 0, count), similarity: new Int16Array(buffer, 4 * count, count) };
    }
    blocks[kind].set(number, block);
    if (blocks[kind].size > MOST_BLOCKS[kind]) blocks[kind].delete(blocks[kind].keys().next().value);
  }

  // The block of a kind ("bags" or "paths"), from memory or from its script.
  function block(kind, number) {
    if (blocks[kind].has(number)) return Promise.resolve(blocks[kind].get(number));
    const file = `data/${kind}-${String(number).padStart(6, "0")}.js`;
    if (!waiting.has(file)) {
      waiting.set(file, new Promise((resolve, reject) => {
        const script = document.createElement("script");
        script.src = file;
        const settle = () => {
          waiting.delete(file);
          script.remove();
          if (blocks[kind].has(number)) resolve(blocks[kind].get(number));
          else reject(new Error(`${file} could not be loaded; make the gallery again: bingo bags gallery`));
        };
        script.onload = script.onerror = settle;
        document.head.append(script);
      }));
    }
    return waiting.get(file);
  }

  // Members of a row, nearest first: [{row, similarity}].
  async function bag(row) {
    const { k, bag_rows, scale } = store.info;
    const { members, similarity } = await block("bags", Math.floor(row / bag_rows));
    const start = (row % bag_rows) * k;
    const found = [];
    for (let i = start; i < start + k; i++) if (members[i] >= 0) found.push({ row: members[i], similarity: similarity[i] / scale });
    return found;
  }

  async function path(row) {
    return (await block("paths", Math.floor(row / store.info.path_rows)))[row % store.info.path_rows];
  }

  // A number of a column as a fraction, or null where it is unknown.
  function share(name, row) {
    const value = store.column[name][row];
    return value === store.info.unknown ? null : value / store.info.scale;
  }

  return { store, meta, columns, put, block, bag, path, share };
})();
