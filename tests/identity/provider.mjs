// An OpenID Connect provider with five people of two tenants, who sign in with their names and get access tokens.
// Arguments: its port, and the name of its signing key, which is a new one at every start.
import { generateKeyPair, exportJWK } from 'jose';
import { Provider } from 'oidc-provider';

const [port, kid] = [Number(process.argv[2]), process.argv[3]];
const issuer = `http://127.0.0.1:${port}`;
const { privateKey } = await generateKeyPair('ES256', { extractable: true });
const key = { ...(await exportJWK(privateKey)), kid, alg: 'ES256', use: 'sig' };

const people = {
  ann: { tenant: 'acme', roles: ['training:admin'] },
  bob: { tenant: 'acme', roles: ['training:admin', 'user'] },
  carl: { tenant: 'acme', roles: ['user'] },
  dora: { tenant: 'other', roles: ['training:admin'] },
  // Signed in ten minutes ago: the token is fresh, and the person is not.
  stale: { tenant: 'acme', roles: ['training:admin'], age: 600 },
};
const client = (client_id) => ({
  client_id,
  client_secret: `${client_id}-secret`,
  grant_types: ['client_credentials'],
  redirect_uris: [],
  response_types: [],
  id_token_signed_response_alg: 'ES256',
});
const provider = new Provider(issuer, {
  jwks: { keys: [key] },
  clients: Object.keys(people).map(client),
  scopes: ['training'],
  clientAuthMethods: ['client_secret_basic'],
  features: {
    devInteractions: { enabled: false },
    clientCredentials: { enabled: true },
    resourceIndicators: {
      enabled: true,
      getResourceServerInfo: (_context, audience) => ({
        scope: 'training',
        audience,
        accessTokenTTL: 300,
        accessTokenFormat: 'jwt',
        jwt: { sign: { alg: 'ES256' } },
      }),
    },
  },
  extraTokenClaims: (_context, token) => {
    const { tenant, roles, age = 0 } = people[token.clientId];
    return { tenant, roles, auth_time: Math.floor(Date.now() / 1000) - age };
  },
});
provider.listen(port, '127.0.0.1', () => console.log(`issuing at ${issuer}`));
