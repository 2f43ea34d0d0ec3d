// The smallest Express server: node express.js PORT
const app = require('express')();
app.get('/health', (request, response) => response.json({ status: 'healthy' }));
app.listen(Number(process.argv[2]), '127.0.0.1');
