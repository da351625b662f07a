// Run by node from the folder with llama.cpp's packages: log-probabilities of prompts.
//
//     node llama_worker.mjs MODEL.gguf IDS.json OUT.json
//
// IDS.json holds lists of token ids.
import {readFile, writeFile} from "node:fs/promises";
import {createRequire} from "node:module";
import {pathToFileURL} from "node:url";

const require = createRequire(`${process.cwd()}/`);
const {getLlama} = await import(pathToFileURL(require.resolve("node-llama-cpp")));

const [modelPath, idsPath, outPath] = process.argv.slice(2);
const llama = await getLlama({gpu: false, build: "never", logLevel: "error"});
const model = await llama.loadModel({modelPath});
const context = await model.createContext({contextSize: 512});
const sequence = context.getSequence();
const found = [];
for (const ids of JSON.parse(await readFile(idsPath, "utf8"))) {
    await sequence.clearHistory();
    const input = ids.map((id) => [id, {generateNext: {logits: true}}]);
    const outputs = await sequence.controlledEvaluate(input);
    found.push(ids.slice(1).map((id, i) => logSoftmax(outputs[i].next.logits, id)));
}
await writeFile(outPath, JSON.stringify(found));
process.exit(0);

function logSoftmax(logits, id) {
    let top = -Infinity;
    for (const value of logits.values()) top = Math.max(top, value);
    let sum = 0;
    for (const value of logits.values()) sum += Math.exp(value - top);
    return logits.get(id) - top - Math.log(sum);
}
