// The smallest server on Node: node http.js PORT
require('node:http')
  .createServer((request, response) => {
    response.setHeader('Content-Type', 'application/json');
    response.end('{"status":"healthy"}');
  })
  .listen(Number(process.argv[2]), '127.0.0.1');
