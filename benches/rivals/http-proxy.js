// http-proxy with connections kept, WebSockets too: node http-proxy.js UPSTREAM PORT
const http = require('node:http');
const proxy = require('http-proxy').createProxyServer({
  target: `http://127.0.0.1:${process.argv[2]}`,
  agent: new http.Agent({ keepAlive: true, maxSockets: 64 }),
  xfwd: true,
  ws: true,
});
proxy.on('error', (error, request, response) => {
  response.writeHead?.(502);
  response.end();
});
http
  .createServer((request, response) => proxy.web(request, response))
  .on('upgrade', (request, socket, head) => proxy.ws(request, socket, head))
  .listen(Number(process.argv[3]), '127.0.0.1');
