// Act with an exported step in JavaScript: a line of JSON in for each timestep, a line out.
//
//   npm install onnxruntime-web
//   flowrl export RUN --out step.onnx && node scripts/examples/act_with_onnx.mjs step.onnx
//
// In:  {"observation": [...], "return_to_go": 3600}; of a new episode also "first": true
// Out: the action, an array of numbers
import { readFile } from "node:fs/promises";
import { createInterface } from "node:readline";
import * as ort from "onnxruntime-web";

const session = await ort.InferenceSession.create(await readFile(process.argv[2]));
const stateInputs = session.inputMetadata.slice(2);
const stateOutputs = session.outputNames.slice(1);

// All zeros before the first timestep: the episode so far, in arrays of constant size.
function emptyState() {
  return Object.fromEntries(
    stateInputs.map(({ name, type, shape }) => {
      const dims = [1, ...shape.slice(1)];
      const size = dims.reduce((product, dim) => product * dim, 1);
      const data = type === "int64" ? new BigInt64Array(size) : new Float32Array(size);
      return [name, new ort.Tensor(type, data, dims)];
    }),
  );
}

let state = emptyState();
for await (const line of createInterface({ input: process.stdin })) {
  const { observation, return_to_go, first } = JSON.parse(line);
  if (first) state = emptyState();
  const outputs = await session.run({
    observations: new ort.Tensor("float32", Float32Array.from(observation), [1, observation.length]),
    returns_to_go: new ort.Tensor("float32", Float32Array.of(return_to_go), [1]),
    ...state,
  });
  state = Object.fromEntries(stateInputs.map(({ name }, index) => [name, outputs[stateOutputs[index]]]));
  console.log(JSON.stringify([...outputs[session.outputNames[0]].data]));
}
