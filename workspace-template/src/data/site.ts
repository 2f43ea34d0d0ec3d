// Facts that appear on more than one page. Change them here, once.

export const site = {
  name: 'Wren Street Pottery',
  description:
    'A small pottery in Aldermere. We throw tableware for everyday use, teach evening classes and keep the kettle on.',
  email: 'hello@wrenstreetpottery.example',
  phone: '01632 960 142',
  phoneHref: 'tel:+441632960142',
  address: ['14 Wren Street', 'Aldermere', 'AL3 7QP'],
  established: 2014,
};

export const navigation = [
  { label: 'About', href: '/about' },
  { label: 'Journal', href: '/journal' },
  { label: 'Visit', href: '/visit' },
];

export const hours = [
  { days: 'Wednesday to Friday', times: '10am to 5pm' },
  { days: 'Saturday', times: '10am to 4pm' },
  { days: 'Sunday to Tuesday', times: 'Closed' },
];

export const classes = [
  {
    name: 'First Turn',
    when: 'Thursdays, 6.30 to 8.30pm, six weeks',
    price: '£180',
    about: 'For complete beginners. You centre, you throw, you glaze, and you go home with four pots.',
  },
  {
    name: 'Open Wheel',
    when: 'Wednesdays and Fridays, 5 to 8pm',
    price: '£18',
    about: 'For people who already know their way around a wheel. Clay and one firing included.',
  },
  {
    name: 'Two by Two',
    when: 'First Saturday of the month, 2 to 4pm',
    price: '£24',
    about: 'One child, one grown-up, one lump of clay. Ages six and up. The price is for the pair.',
  },
];

// The five house glazes. The names are used by journal entries and by the glaze shelf.
export const glazes = [
  { id: 'harbour', name: 'Harbour', note: 'Cobalt blue over a dark slip. It breaks paler where it runs thin, so every rim is different.' },
  { id: 'butter', name: 'Butter', note: 'Warm yellow with iron freckles. The first glaze we ever mixed, and still the best seller.' },
  { id: 'rust', name: 'Rust', note: 'A glossy iron red. It likes a slow cooling, so it only goes in the bottom of the kiln.' },
  { id: 'celadon', name: 'Celadon', note: 'Grey-green and quiet. It pools in throwing rings and makes soup look better.' },
  { id: 'oat', name: 'Oat', note: 'Off-white and satin, speckled by the clay underneath. Goes with everything you already own.' },
] as const;
