import { defineCollection } from 'astro:content';
import { glob } from 'astro/loaders';
import { z } from 'astro/zod';

const journal = defineCollection({
  loader: glob({ pattern: '**/*.md', base: './src/content/journal' }),
  schema: z.object({
    title: z.string(),
    summary: z.string(),
    date: z.coerce.date(),
    author: z.string(),
    topic: z.string(),
    glaze: z.enum(['harbour', 'butter', 'rust', 'celadon', 'oat']).default('harbour'),
  }),
});

export const collections = { journal };
