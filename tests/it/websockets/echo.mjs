// An echoing server of npm's `ws`; prints its port.
import { createRequire } from "node:module";

const { WebSocketServer } = createRequire(process.argv[2] + "/")("ws");
const limits = { maxPayload: 64 << 20, perMessageDeflate: { threshold: 0 } };
const server = new WebSocketServer({ host: "127.0.0.1", port: 0, ...limits }, () =>
  console.log(server.address().port),
);
server.on("connection", (socket) => {
  socket.on("error", () => {});
  socket.on("message", (data, binary) => socket.send(data, { binary }));
});
